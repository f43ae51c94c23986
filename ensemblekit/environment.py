"""Owns the environment block: what figures depend on besides the code.

Input: this machine.
"""

import os
import platform
from typing import Any

import numpy as np
import torch

from ensemblekit import __version__
from ensemblekit.machine import processor


def block() -> dict[str, Any]:
    """What figures depend on: versions and the machine."""
    return {
        "ensemblekit": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
    }


def device_name(device: torch.device) -> str:
    """The name of the hardware behind a torch device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()


def gpu_state(device: torch.device) -> dict[str, Any] | None:
    """Clocks (MHz), temperature (C), power (W) and throttling of a GPU at this moment.

    None where there is no GPU, or nvidia-ml-py (`pip install ensemblekit[gpu]`) is not installed.
    """
    if device.type != "cuda":
        return None
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        try:
            uuid = str(torch.cuda.get_device_properties(device).uuid)
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
            reasons = pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
            idle = pynvml.nvmlClocksThrottleReasonGpuIdle
            return {
                "sm_clock_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
                "memory_clock_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM),
                "temperature_c": pynvml.nvmlDeviceGetTemperature(
                    handle, pynvml.NVML_TEMPERATURE_GPU
                ),
                "power_w": pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
                "throttled": bool(reasons & ~idle),
            }
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return None
