"""The relay's students: small, fresh, one with the teacher's tokenizer and one with its own.

Both are the demo's student start (`tools.demo.models`): trained for a moment on the corpus, held-out samples
left out, so that there is something to go on from.
"""

from __future__ import annotations

from pathlib import Path

from precompute.corpus import open_corpus
from precompute.prepare import split_of
from student.model import without_progress_bar
from student.pretrain import PretrainConfig, TrainingText
from student.tokenizer import load_tokenizer
from tools.console import Report
from tools.demo.models import Recipe, make_model, make_tokenizer, model_key, training_samples


def make_student(
    out: Path,
    *,
    tokenizer_of: Path | None,
    corpus: str,
    vocab_size: int,
    steps: tuple[int, int],
    block_size: int,
    max_length: int,
    holdout: float,
    seed: int,
    report: Report,
) -> Path:
    """Write a student's folder, unless it holds this student already.

    Args:
        tokenizer_of: the teacher whose tokenizer, a mask token added, is the student's; None = one of its
            own, of `vocab_size` entries, is trained on the training samples.
        steps: of its autoregressive warm-up and of diffusion.
    """
    rows = open_corpus(corpus)
    conversations = list(rows)
    if tokenizer_of is None:
        train = [c for c in conversations if split_of(c, holdout=holdout, seed=seed) == "train"]
        tokenizer = make_tokenizer(train, vocab_size=vocab_size, chatml=True)
    else:
        tokenizer = load_tokenizer(tokenizer_of)
    training = PretrainConfig(
        block_size=block_size,
        ar_steps=steps[0],
        diffusion_steps=steps[1],
        batch_size=16,
        learning_rate=6e-3,
        diffusion_learning_rate=4e-3,
        seed=seed,
    )
    recipe = Recipe(
        role="student-start", vocab_size=len(tokenizer), training=training, max_length=max_length, seed=seed
    )
    samples = training_samples(
        tokenizer, conversations, block_size=block_size, max_length=max_length, holdout=holdout, seed=seed
    )
    texts = [TrainingText(s.student_ids, s.maskable) for s in samples]
    out.parent.mkdir(parents=True, exist_ok=True)
    key = model_key(recipe, rows.fingerprint, seed, holdout)
    with without_progress_bar():
        make_model(recipe, tokenizer, texts, out, key=key, report=report)
    return out
