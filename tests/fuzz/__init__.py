"""Random and broken inputs: each is answered or refused with a typed error, never a traceback.

`python -m tests.fuzz --inputs 20000 --out FOLDER` runs them; `tests/slow/test_fuzz.py` a few.
"""
