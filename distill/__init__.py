"""Recipe, training, evaluation, export and report: what turns a cache of teacher embeddings into a student."""
