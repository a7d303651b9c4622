"""A student's answers to tasks: lm-evaluation-harness, the paper's eight, programs in a sandbox."""
