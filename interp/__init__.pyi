from . import calibration as calibration
from . import circuits as circuits
from . import edits as edits
from . import errors as errors
from . import mechanics as mechanics
from . import models as models
from . import probes as probes
from . import procedures as procedures
from . import scenes as scenes
from . import scores as scores
from . import tasks as tasks
from . import vision as vision
from .atlas import Atlas as Atlas
from .calibration.calibration import Calibration as Calibration
from .calibration.run import calibrate as calibrate
from .errors import InterpError as InterpError
from .evaluation.ablation import ablate as ablate
from .evaluation.evaluate import evaluate as evaluate
from .heads import Head as Head
from .heads import Layout as Layout
from .loading import load as load
from .results.evaluation import Evaluation as Evaluation
from .scan.rhythm import rhythm as rhythm
from .scan.run import plan_scan as plan_scan
from .scan.run import scan_heads as scan_heads
from .vision.overlay import overlay as overlay

__version__: str
