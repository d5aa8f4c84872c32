from .choosing import gate_for as gate_for
from .compress import compress as compress
from .compression import Compression as Compression
from .head_cache import HeadCache as HeadCache
from .heavy_cache import HeavyHitterCache as HeavyHitterCache
from .shard_cache import ShardCache as ShardCache
from .snap_cache import SnapCache as SnapCache
