from .calibration import Calibration as Calibration
from .calibration_method import Method as Method
from .catalogue import names as names
from .catalogue import registry as registry
from .run import calibrate as calibrate
