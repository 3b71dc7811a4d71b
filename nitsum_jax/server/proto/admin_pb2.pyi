from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class GetControlRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SetControlRequest(_message.Message):
    __slots__ = ("paused",)
    PAUSED_FIELD_NUMBER: _ClassVar[int]
    paused: bool
    def __init__(self, paused: _Optional[bool] = ...) -> None: ...

class ControlState(_message.Message):
    __slots__ = ("mode", "paused", "decision_json", "applied", "plan_ms", "failures")
    MODE_FIELD_NUMBER: _ClassVar[int]
    PAUSED_FIELD_NUMBER: _ClassVar[int]
    DECISION_JSON_FIELD_NUMBER: _ClassVar[int]
    APPLIED_FIELD_NUMBER: _ClassVar[int]
    PLAN_MS_FIELD_NUMBER: _ClassVar[int]
    FAILURES_FIELD_NUMBER: _ClassVar[int]
    mode: str
    paused: bool
    decision_json: str
    applied: bool
    plan_ms: float
    failures: int
    def __init__(self, mode: _Optional[str] = ..., paused: _Optional[bool] = ..., decision_json: _Optional[str] = ..., applied: _Optional[bool] = ..., plan_ms: _Optional[float] = ..., failures: _Optional[int] = ...) -> None: ...

class ForceLayoutRequest(_message.Message):
    __slots__ = ("layout",)
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    layout: str
    def __init__(self, layout: _Optional[str] = ...) -> None: ...

class ForceLayoutResponse(_message.Message):
    __slots__ = ("from_layout", "to_layout", "stall_ms", "sequences")
    FROM_LAYOUT_FIELD_NUMBER: _ClassVar[int]
    TO_LAYOUT_FIELD_NUMBER: _ClassVar[int]
    STALL_MS_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    from_layout: str
    to_layout: str
    stall_ms: float
    sequences: int
    def __init__(self, from_layout: _Optional[str] = ..., to_layout: _Optional[str] = ..., stall_ms: _Optional[float] = ..., sequences: _Optional[int] = ...) -> None: ...

class SetDeviceRequest(_message.Message):
    __slots__ = ("device", "lost")
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    LOST_FIELD_NUMBER: _ClassVar[int]
    device: int
    lost: bool
    def __init__(self, device: _Optional[int] = ..., lost: _Optional[bool] = ...) -> None: ...

class SetDeviceResponse(_message.Message):
    __slots__ = ("lost",)
    LOST_FIELD_NUMBER: _ClassVar[int]
    lost: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, lost: _Optional[_Iterable[int]] = ...) -> None: ...

class ReloadKeysRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ReloadKeysResponse(_message.Message):
    __slots__ = ("keys", "added", "removed", "changed")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    ADDED_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    CHANGED_FIELD_NUMBER: _ClassVar[int]
    keys: int
    added: _containers.RepeatedScalarFieldContainer[str]
    removed: _containers.RepeatedScalarFieldContainer[str]
    changed: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, keys: _Optional[int] = ..., added: _Optional[_Iterable[str]] = ..., removed: _Optional[_Iterable[str]] = ..., changed: _Optional[_Iterable[str]] = ...) -> None: ...

class ProfileRequest(_message.Message):
    __slots__ = ("seconds",)
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    seconds: float
    def __init__(self, seconds: _Optional[float] = ...) -> None: ...

class ProfileResponse(_message.Message):
    __slots__ = ("folder",)
    FOLDER_FIELD_NUMBER: _ClassVar[int]
    folder: str
    def __init__(self, folder: _Optional[str] = ...) -> None: ...
