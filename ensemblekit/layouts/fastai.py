"""Owns fastai: `models/NAME.pth` of `Learner.save`.

Input: a dict of exactly model and `opt`.
"""

from ensemblekit.layouts.dialect import dialect

match, weights, facts = dialect(marks=("model", "opt"), weights={"model": "model"}, metrics={})
