"""The evidence: a study of the method on real text, at a scale that a laptop or one GPU allows.

    python -m studies run studies/cpu.yaml --out study-out
    python -m studies status studies/cpu.yaml --out study-out
    python -m studies report study-out

A study is a YAML file (`studies.config`): a corpus split by module, models trained on it, logit datasets that
they make, and questions, each a set of students to compare. Every piece of work is a task whose folder is
named by a hash of all that decides it (`studies.tasks`), so nothing is done twice and a killed run goes on.
docs/study.md says what came out.
"""
