from . import pictures as pictures
from .ablation import ablate as ablate
from .evaluate import evaluate as evaluate
