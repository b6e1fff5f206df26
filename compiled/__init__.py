"""Fast modules with the semantics of `reference`; they import its constants and configs, no Megatron and no files."""

from compiled.full_dim_norm import FullDimQKNorm, FullDimRMSNorm
from compiled.rms_norm import RMSNorm

__all__ = ["FullDimQKNorm", "FullDimRMSNorm", "RMSNorm"]
