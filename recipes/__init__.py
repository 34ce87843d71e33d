"""The recipes: one YAML file each; the file's name is the recipe's name."""
