"""The table of claims: `python docs/claims.py [--write]`.

It is made from the records under results/. With --write docs/claims.md is brought up to date.
"""

import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "claims.md"


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from bn_jax.figures import claims

    text = claims.page(ROOT / "results")
    if sys.argv[1:] == ["--write"]:
        DOCUMENT.write_text(text)
    else:
        print(text)
