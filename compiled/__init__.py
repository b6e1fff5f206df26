"""Fast modules with the semantics of `reference`; they import its constants and configs, no Megatron and no files."""

from compiled.norm.modules import FullDimQKNorm, FullDimRMSNorm, ReplicatedFullDimRMSNorm, RMSNorm

__all__ = ["FullDimQKNorm", "FullDimRMSNorm", "RMSNorm", "ReplicatedFullDimRMSNorm"]
