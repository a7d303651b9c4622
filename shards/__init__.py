"""The logit dataset: noise plan, alignment, row, format. numpy and pyarrow only; imports nothing of ours."""
