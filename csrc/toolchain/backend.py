"""setuptools' build backend, which also asks for a CUDA compiler where there is a GPU and none to be found."""

from __future__ import annotations

from typing import Any

import cuda_toolchain
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403 - a build backend is a module with these functions


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return build_meta.get_requires_for_build_wheel(config_settings) + _compiler()


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return build_meta.get_requires_for_build_editable(config_settings) + _compiler()


def _compiler() -> list[str]:
    if cuda_toolchain.find() is not None or not cuda_toolchain.visible_architectures():
        return []
    return [f"{name}=={cuda_toolchain.WHEEL_VERSION}" for name in cuda_toolchain.WHEELS]
