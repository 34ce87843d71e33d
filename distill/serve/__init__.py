"""A student as a service: pictures and prompts over HTTP in, masks out."""
