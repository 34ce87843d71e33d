"""Files for other runtimes: one module a format, and the proof that each is right."""
