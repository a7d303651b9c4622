"""The student: packed layout, attention predicate, model, objectives, trainer, evaluation. Knows no
teacher.

Importing it registers the family `a2d-qwen3` with transformers' Auto classes.
"""

from student import model as model
