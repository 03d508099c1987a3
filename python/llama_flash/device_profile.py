"""device/profile.py under the name that users import."""

from .device.profile import DeviceProfile, ReadRate

__all__ = ["DeviceProfile", "ReadRate"]
