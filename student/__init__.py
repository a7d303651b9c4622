"""The student: packed layout, attention predicate, model, objectives, trainer, evaluation. Knows no
teacher."""
