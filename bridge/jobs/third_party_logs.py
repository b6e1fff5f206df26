"""What other packages log that says nothing to the user of this one."""

import logging


def drop_remark_on_gpus() -> None:
    """torch says where it finds a compiler for GPUs and no GPU, which is as good a machine as any here.

    Only this remark goes: `torch.utils.cpp_extension` has other things to say.
    """
    logging.getLogger("torch.utils.cpp_extension").addFilter(_is_another)  # adding it twice does nothing


def _is_another(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("No CUDA runtime is found")
