"""Helpers that notebooks and forks import from `util.misc`; they are defined in modules named after their topics."""

from util.box_ops import inverse_sigmoid
from util.distributed import (
    get_rank,
    get_world_size,
    init_distributed_mode,
    is_dist_avail_and_initialized,
    is_main_process,
    reduce_dict,
)
from util.files import save_on_master
from util.logger import MetricLogger, SmoothedValue
from util.nested_tensor import NestedTensor, collate_fn, nested_tensor_from_tensor_list

__all__ = [
    "MetricLogger",
    "NestedTensor",
    "SmoothedValue",
    "collate_fn",
    "get_rank",
    "get_world_size",
    "init_distributed_mode",
    "inverse_sigmoid",
    "is_dist_avail_and_initialized",
    "is_main_process",
    "nested_tensor_from_tensor_list",
    "reduce_dict",
    "save_on_master",
]
