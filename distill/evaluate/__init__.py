"""What a student is worth: one module a task."""
