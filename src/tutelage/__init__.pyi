from tutelage import objective as objective
from tutelage.config.data_config import StoreConfig as StoreConfig
from tutelage.config.objective_config import Objective as Objective
from tutelage.config.objective_config import TopK as TopK
from tutelage.config.objective_config import TopP as TopP
from tutelage.config.run_config import RunConfig as RunConfig
from tutelage.config.study_config import StudyConfig as StudyConfig
from tutelage.data.build import build_store as build_store
from tutelage.data.store import open_store as open_store
from tutelage.errors import Stopped as Stopped
from tutelage.errors import UserError as UserError
from tutelage.objective import ObjectiveHead as ObjectiveHead
from tutelage.objective import chunked_objective as chunked_objective
from tutelage.objective import reference_objective as reference_objective
from tutelage.objective import weight_and_bias as weight_and_bias
from tutelage.run import run as run
from tutelage.types import Batch as Batch
from tutelage.types import DenseTargets as DenseTargets
from tutelage.types import LogitTargets as LogitTargets
from tutelage.types import LogitTransform as LogitTransform
from tutelage.types import LossSums as LossSums
from tutelage.types import Score as Score
from tutelage.types import SparseTargets as SparseTargets

__version__: str
