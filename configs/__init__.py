"""One experiment a file; `inception` and `mnist` are the roots, the others change a few keys."""
