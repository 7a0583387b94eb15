"""What an evaluation says: errors with counts and standard errors, and the ensemble's gain."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from bn_jax import predictions
from bn_jax.predictions import Predictions


def errors(scores: dict[str, Any]) -> str:
    """Errors as in Fig. 4, each with its binomial standard error and count."""
    n, said = scores["examples"], []
    for name, share in (("top-1", 1 - scores["top1"]), ("top-5", 1 - scores["top5"])):
        spread = 100 * math.sqrt(max(share * (1 - share), 0) / n)
        said.append(f"{name} error {100 * share:.2f}% +- {spread:.2f} ({round(share * n):,})")
    return f"{', '.join(said)} of {n:,} examples"


def show(parts: Sequence[Predictions]) -> dict[str, Any]:
    """Prints each part's errors and those of their mean. Returns the line of evaluations.jsonl.

    Raises ConfigError if the parts cannot be averaged.
    """
    whole = predictions.mean(parts)
    scored = [predictions.scores(part) for part in parts]
    result = predictions.scores(whole)
    seen = f"{whole.about['views']} views" if whole.about["views"] > 1 else "single crop"
    print(f"{whole.about['split']} split, {seen}, {whole.about['statistics']} statistics")
    if len(parts) > 1:
        for part, one in zip(parts, scored, strict=True):
            print(f"  {predictions.who(part.about)}: {errors(one)}")
        alone = [one["top1"] for one in scored]
        gains = [100 * (result["top1"] - x) for x in (float(np.mean(alone)), max(alone))]
        print(f"mean of {len(whole.about['members'])} networks: {errors(result)}")
        print(
            f"gain in top-1: {gains[0]:+.2f} points on the members' mean, {gains[1]:+.2f} on the "
            "best of them"
        )
    else:
        print(errors(result))
    print(whole.about["description"])
    line = {"kind": "evaluation", **result, **whole.about}
    del line["class_names"]
    return line | {"member_scores": scored if len(parts) > 1 else []}
