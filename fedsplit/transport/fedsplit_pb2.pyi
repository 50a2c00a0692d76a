from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[DType]
    FLOAT32: _ClassVar[DType]
    BFLOAT16: _ClassVar[DType]
    FLOAT16: _ClassVar[DType]
    FLOAT64: _ClassVar[DType]
    INT64: _ClassVar[DType]
    INT32: _ClassVar[DType]
    BOOL: _ClassVar[DType]
DTYPE_UNSPECIFIED: DType
FLOAT32: DType
BFLOAT16: DType
FLOAT16: DType
FLOAT64: DType
INT64: DType
INT32: DType
BOOL: DType

class Frame(_message.Message):
    __slots__ = ("header", "payload")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    header: Header
    payload: bytes
    def __init__(self, header: _Optional[_Union[Header, _Mapping]] = ..., payload: _Optional[bytes] = ...) -> None: ...

class Header(_message.Message):
    __slots__ = ("open_request", "open_reply", "forward_request", "forward_reply", "backward_request", "backward_reply", "step_request", "step_reply", "close_request", "close_reply", "gradients_request", "gradients_reply", "training_state_request", "training_state_reply", "service_info_request", "service_info_reply", "chunk", "error", "generate_request", "generate_reply", "contribute_request", "parameters_request", "parameters_reply", "work_report_request", "work_report_reply", "payload_bytes", "trace")
    OPEN_REQUEST_FIELD_NUMBER: _ClassVar[int]
    OPEN_REPLY_FIELD_NUMBER: _ClassVar[int]
    FORWARD_REQUEST_FIELD_NUMBER: _ClassVar[int]
    FORWARD_REPLY_FIELD_NUMBER: _ClassVar[int]
    BACKWARD_REQUEST_FIELD_NUMBER: _ClassVar[int]
    BACKWARD_REPLY_FIELD_NUMBER: _ClassVar[int]
    STEP_REQUEST_FIELD_NUMBER: _ClassVar[int]
    STEP_REPLY_FIELD_NUMBER: _ClassVar[int]
    CLOSE_REQUEST_FIELD_NUMBER: _ClassVar[int]
    CLOSE_REPLY_FIELD_NUMBER: _ClassVar[int]
    GRADIENTS_REQUEST_FIELD_NUMBER: _ClassVar[int]
    GRADIENTS_REPLY_FIELD_NUMBER: _ClassVar[int]
    TRAINING_STATE_REQUEST_FIELD_NUMBER: _ClassVar[int]
    TRAINING_STATE_REPLY_FIELD_NUMBER: _ClassVar[int]
    SERVICE_INFO_REQUEST_FIELD_NUMBER: _ClassVar[int]
    SERVICE_INFO_REPLY_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    GENERATE_REQUEST_FIELD_NUMBER: _ClassVar[int]
    GENERATE_REPLY_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTE_REQUEST_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_REQUEST_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_REPLY_FIELD_NUMBER: _ClassVar[int]
    WORK_REPORT_REQUEST_FIELD_NUMBER: _ClassVar[int]
    WORK_REPORT_REPLY_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    TRACE_FIELD_NUMBER: _ClassVar[int]
    open_request: OpenRequest
    open_reply: OpenReply
    forward_request: ForwardRequest
    forward_reply: ForwardReply
    backward_request: BackwardRequest
    backward_reply: BackwardReply
    step_request: StepRequest
    step_reply: StepReply
    close_request: CloseRequest
    close_reply: CloseReply
    gradients_request: GradientsRequest
    gradients_reply: GradientsReply
    training_state_request: TrainingStateRequest
    training_state_reply: TrainingStateReply
    service_info_request: ServiceInfoRequest
    service_info_reply: ServiceInfoReply
    chunk: Chunk
    error: Error
    generate_request: GenerateRequest
    generate_reply: GenerateReply
    contribute_request: ContributeRequest
    parameters_request: ParametersRequest
    parameters_reply: ParametersReply
    work_report_request: WorkReportRequest
    work_report_reply: WorkReportReply
    payload_bytes: int
    trace: bytes
    def __init__(self, open_request: _Optional[_Union[OpenRequest, _Mapping]] = ..., open_reply: _Optional[_Union[OpenReply, _Mapping]] = ..., forward_request: _Optional[_Union[ForwardRequest, _Mapping]] = ..., forward_reply: _Optional[_Union[ForwardReply, _Mapping]] = ..., backward_request: _Optional[_Union[BackwardRequest, _Mapping]] = ..., backward_reply: _Optional[_Union[BackwardReply, _Mapping]] = ..., step_request: _Optional[_Union[StepRequest, _Mapping]] = ..., step_reply: _Optional[_Union[StepReply, _Mapping]] = ..., close_request: _Optional[_Union[CloseRequest, _Mapping]] = ..., close_reply: _Optional[_Union[CloseReply, _Mapping]] = ..., gradients_request: _Optional[_Union[GradientsRequest, _Mapping]] = ..., gradients_reply: _Optional[_Union[GradientsReply, _Mapping]] = ..., training_state_request: _Optional[_Union[TrainingStateRequest, _Mapping]] = ..., training_state_reply: _Optional[_Union[TrainingStateReply, _Mapping]] = ..., service_info_request: _Optional[_Union[ServiceInfoRequest, _Mapping]] = ..., service_info_reply: _Optional[_Union[ServiceInfoReply, _Mapping]] = ..., chunk: _Optional[_Union[Chunk, _Mapping]] = ..., error: _Optional[_Union[Error, _Mapping]] = ..., generate_request: _Optional[_Union[GenerateRequest, _Mapping]] = ..., generate_reply: _Optional[_Union[GenerateReply, _Mapping]] = ..., contribute_request: _Optional[_Union[ContributeRequest, _Mapping]] = ..., parameters_request: _Optional[_Union[ParametersRequest, _Mapping]] = ..., parameters_reply: _Optional[_Union[ParametersReply, _Mapping]] = ..., work_report_request: _Optional[_Union[WorkReportRequest, _Mapping]] = ..., work_report_reply: _Optional[_Union[WorkReportReply, _Mapping]] = ..., payload_bytes: _Optional[int] = ..., trace: _Optional[bytes] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("offset",)
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    offset: int
    def __init__(self, offset: _Optional[int] = ...) -> None: ...

class Error(_message.Message):
    __slots__ = ("code", "message", "retry_after_ms")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    retry_after_ms: int
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ..., retry_after_ms: _Optional[int] = ...) -> None: ...

class TensorMeta(_message.Message):
    __slots__ = ("dtype", "codec", "shape", "nbytes")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    dtype: DType
    codec: int
    shape: _containers.RepeatedScalarFieldContainer[int]
    nbytes: int
    def __init__(self, dtype: _Optional[_Union[DType, str]] = ..., codec: _Optional[int] = ..., shape: _Optional[_Iterable[int]] = ..., nbytes: _Optional[int] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_rows", "max_tokens", "hidden_size", "session_tokens", "stateless_bytes")
    MAX_ROWS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    SESSION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STATELESS_BYTES_FIELD_NUMBER: _ClassVar[int]
    max_rows: int
    max_tokens: int
    hidden_size: int
    session_tokens: int
    stateless_bytes: int
    def __init__(self, max_rows: _Optional[int] = ..., max_tokens: _Optional[int] = ..., hidden_size: _Optional[int] = ..., session_tokens: _Optional[int] = ..., stateless_bytes: _Optional[int] = ...) -> None: ...

class OpenRequest(_message.Message):
    __slots__ = ("protocol", "client", "model", "config", "hidden_size", "round", "training", "generating", "cache_tokens", "served_model_name", "identity", "model_settings", "run_settings", "last_instance_id")
    class IdentityEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    class ModelSettingsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    class RunSettingsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    TRAINING_FIELD_NUMBER: _ClassVar[int]
    GENERATING_FIELD_NUMBER: _ClassVar[int]
    CACHE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SERVED_MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    MODEL_SETTINGS_FIELD_NUMBER: _ClassVar[int]
    RUN_SETTINGS_FIELD_NUMBER: _ClassVar[int]
    LAST_INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    client: str
    model: str
    config: str
    hidden_size: int
    round: int
    training: bool
    generating: bool
    cache_tokens: int
    served_model_name: str
    identity: _containers.ScalarMap[str, str]
    model_settings: _containers.ScalarMap[str, str]
    run_settings: _containers.ScalarMap[str, str]
    last_instance_id: str
    def __init__(self, protocol: _Optional[int] = ..., client: _Optional[str] = ..., model: _Optional[str] = ..., config: _Optional[str] = ..., hidden_size: _Optional[int] = ..., round: _Optional[int] = ..., training: bool = ..., generating: bool = ..., cache_tokens: _Optional[int] = ..., served_model_name: _Optional[str] = ..., identity: _Optional[_Mapping[str, str]] = ..., model_settings: _Optional[_Mapping[str, str]] = ..., run_settings: _Optional[_Mapping[str, str]] = ..., last_instance_id: _Optional[str] = ...) -> None: ...

class OpenReply(_message.Message):
    __slots__ = ("session", "server_instance_id", "version", "limits", "autocast", "save_every", "kept_version")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    SERVER_INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    AUTOCAST_FIELD_NUMBER: _ClassVar[int]
    SAVE_EVERY_FIELD_NUMBER: _ClassVar[int]
    KEPT_VERSION_FIELD_NUMBER: _ClassVar[int]
    session: str
    server_instance_id: str
    version: int
    limits: Limits
    autocast: str
    save_every: int
    kept_version: int
    def __init__(self, session: _Optional[str] = ..., server_instance_id: _Optional[str] = ..., version: _Optional[int] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., autocast: _Optional[str] = ..., save_every: _Optional[int] = ..., kept_version: _Optional[int] = ...) -> None: ...

class ForwardRequest(_message.Message):
    __slots__ = ("session", "call", "training", "smashed_BTD", "attention_mask_BT", "position_ids_BT", "codec", "bases_B", "references", "other_mode", "calls_ago", "autocast")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    CALL_FIELD_NUMBER: _ClassVar[int]
    TRAINING_FIELD_NUMBER: _ClassVar[int]
    SMASHED_BTD_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_MASK_BT_FIELD_NUMBER: _ClassVar[int]
    POSITION_IDS_BT_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    BASES_B_FIELD_NUMBER: _ClassVar[int]
    REFERENCES_FIELD_NUMBER: _ClassVar[int]
    OTHER_MODE_FIELD_NUMBER: _ClassVar[int]
    CALLS_AGO_FIELD_NUMBER: _ClassVar[int]
    AUTOCAST_FIELD_NUMBER: _ClassVar[int]
    session: str
    call: int
    training: bool
    smashed_BTD: TensorMeta
    attention_mask_BT: TensorMeta
    position_ids_BT: TensorMeta
    codec: str
    bases_B: TensorMeta
    references: _containers.RepeatedCompositeFieldContainer[TensorMeta]
    other_mode: bool
    calls_ago: int
    autocast: str
    def __init__(self, session: _Optional[str] = ..., call: _Optional[int] = ..., training: bool = ..., smashed_BTD: _Optional[_Union[TensorMeta, _Mapping]] = ..., attention_mask_BT: _Optional[_Union[TensorMeta, _Mapping]] = ..., position_ids_BT: _Optional[_Union[TensorMeta, _Mapping]] = ..., codec: _Optional[str] = ..., bases_B: _Optional[_Union[TensorMeta, _Mapping]] = ..., references: _Optional[_Iterable[_Union[TensorMeta, _Mapping]]] = ..., other_mode: bool = ..., calls_ago: _Optional[int] = ..., autocast: _Optional[str] = ...) -> None: ...

class ForwardReply(_message.Message):
    __slots__ = ("trunk_out_BTD", "version", "codec")
    TRUNK_OUT_BTD_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    trunk_out_BTD: TensorMeta
    version: int
    codec: str
    def __init__(self, trunk_out_BTD: _Optional[_Union[TensorMeta, _Mapping]] = ..., version: _Optional[int] = ..., codec: _Optional[str] = ...) -> None: ...

class BackwardRequest(_message.Message):
    __slots__ = ("session", "call", "want_grad", "grad_trunk_out_BTD", "codec")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    CALL_FIELD_NUMBER: _ClassVar[int]
    WANT_GRAD_FIELD_NUMBER: _ClassVar[int]
    GRAD_TRUNK_OUT_BTD_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    session: str
    call: int
    want_grad: bool
    grad_trunk_out_BTD: TensorMeta
    codec: str
    def __init__(self, session: _Optional[str] = ..., call: _Optional[int] = ..., want_grad: bool = ..., grad_trunk_out_BTD: _Optional[_Union[TensorMeta, _Mapping]] = ..., codec: _Optional[str] = ...) -> None: ...

class BackwardReply(_message.Message):
    __slots__ = ("grad_smashed_BTD", "trunk_sq_norm", "codec")
    GRAD_SMASHED_BTD_FIELD_NUMBER: _ClassVar[int]
    TRUNK_SQ_NORM_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    grad_smashed_BTD: TensorMeta
    trunk_sq_norm: float
    codec: str
    def __init__(self, grad_smashed_BTD: _Optional[_Union[TensorMeta, _Mapping]] = ..., trunk_sq_norm: _Optional[float] = ..., codec: _Optional[str] = ...) -> None: ...

class StepRequest(_message.Message):
    __slots__ = ("session", "call", "step", "num_tokens", "client_sq_norm", "loss_scale")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    CALL_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CLIENT_SQ_NORM_FIELD_NUMBER: _ClassVar[int]
    LOSS_SCALE_FIELD_NUMBER: _ClassVar[int]
    session: str
    call: int
    step: int
    num_tokens: int
    client_sq_norm: float
    loss_scale: float
    def __init__(self, session: _Optional[str] = ..., call: _Optional[int] = ..., step: _Optional[int] = ..., num_tokens: _Optional[int] = ..., client_sq_norm: _Optional[float] = ..., loss_scale: _Optional[float] = ...) -> None: ...

class StepReply(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: int
    def __init__(self, version: _Optional[int] = ...) -> None: ...

class KVCacheEntry(_message.Message):
    __slots__ = ("block", "keys_BHTE", "values_BHTE")
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    KEYS_BHTE_FIELD_NUMBER: _ClassVar[int]
    VALUES_BHTE_FIELD_NUMBER: _ClassVar[int]
    block: int
    keys_BHTE: TensorMeta
    values_BHTE: TensorMeta
    def __init__(self, block: _Optional[int] = ..., keys_BHTE: _Optional[_Union[TensorMeta, _Mapping]] = ..., values_BHTE: _Optional[_Union[TensorMeta, _Mapping]] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("session", "call", "past", "logits_to_keep", "smashed_BTD", "rows_B", "attention_mask_BT", "position_ids_BT", "record_past", "stateless", "entries", "autocast", "source", "source_call")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    CALL_FIELD_NUMBER: _ClassVar[int]
    PAST_FIELD_NUMBER: _ClassVar[int]
    LOGITS_TO_KEEP_FIELD_NUMBER: _ClassVar[int]
    SMASHED_BTD_FIELD_NUMBER: _ClassVar[int]
    ROWS_B_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_MASK_BT_FIELD_NUMBER: _ClassVar[int]
    POSITION_IDS_BT_FIELD_NUMBER: _ClassVar[int]
    RECORD_PAST_FIELD_NUMBER: _ClassVar[int]
    STATELESS_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    AUTOCAST_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    SOURCE_CALL_FIELD_NUMBER: _ClassVar[int]
    session: str
    call: int
    past: int
    logits_to_keep: int
    smashed_BTD: TensorMeta
    rows_B: TensorMeta
    attention_mask_BT: TensorMeta
    position_ids_BT: TensorMeta
    record_past: bool
    stateless: bool
    entries: _containers.RepeatedCompositeFieldContainer[KVCacheEntry]
    autocast: str
    source: str
    source_call: int
    def __init__(self, session: _Optional[str] = ..., call: _Optional[int] = ..., past: _Optional[int] = ..., logits_to_keep: _Optional[int] = ..., smashed_BTD: _Optional[_Union[TensorMeta, _Mapping]] = ..., rows_B: _Optional[_Union[TensorMeta, _Mapping]] = ..., attention_mask_BT: _Optional[_Union[TensorMeta, _Mapping]] = ..., position_ids_BT: _Optional[_Union[TensorMeta, _Mapping]] = ..., record_past: bool = ..., stateless: bool = ..., entries: _Optional[_Iterable[_Union[KVCacheEntry, _Mapping]]] = ..., autocast: _Optional[str] = ..., source: _Optional[str] = ..., source_call: _Optional[int] = ...) -> None: ...

class GenerateReply(_message.Message):
    __slots__ = ("trunk_out_BTD", "entries")
    TRUNK_OUT_BTD_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    trunk_out_BTD: TensorMeta
    entries: _containers.RepeatedCompositeFieldContainer[KVCacheEntry]
    def __init__(self, trunk_out_BTD: _Optional[_Union[TensorMeta, _Mapping]] = ..., entries: _Optional[_Iterable[_Union[KVCacheEntry, _Mapping]]] = ...) -> None: ...

class CloseRequest(_message.Message):
    __slots__ = ("session",)
    SESSION_FIELD_NUMBER: _ClassVar[int]
    session: str
    def __init__(self, session: _Optional[str] = ...) -> None: ...

class CloseReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GradientsRequest(_message.Message):
    __slots__ = ("session", "tensors")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    session: str
    tensors: bool
    def __init__(self, session: _Optional[str] = ..., tensors: bool = ...) -> None: ...

class GradientsReply(_message.Message):
    __slots__ = ("norms", "names", "gradients")
    class NormsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    NORMS_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    GRADIENTS_FIELD_NUMBER: _ClassVar[int]
    norms: _containers.ScalarMap[str, float]
    names: _containers.RepeatedScalarFieldContainer[str]
    gradients: _containers.RepeatedCompositeFieldContainer[TensorMeta]
    def __init__(self, norms: _Optional[_Mapping[str, float]] = ..., names: _Optional[_Iterable[str]] = ..., gradients: _Optional[_Iterable[_Union[TensorMeta, _Mapping]]] = ...) -> None: ...

class TrainingStateRequest(_message.Message):
    __slots__ = ("session",)
    SESSION_FIELD_NUMBER: _ClassVar[int]
    session: str
    def __init__(self, session: _Optional[str] = ...) -> None: ...

class TrainingStateReply(_message.Message):
    __slots__ = ("round", "step", "lr", "version")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    LR_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    round: int
    step: int
    lr: float
    version: int
    def __init__(self, round: _Optional[int] = ..., step: _Optional[int] = ..., lr: _Optional[float] = ..., version: _Optional[int] = ...) -> None: ...

class ServiceInfoRequest(_message.Message):
    __slots__ = ("served_model_name",)
    SERVED_MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    served_model_name: str
    def __init__(self, served_model_name: _Optional[str] = ...) -> None: ...

class ServiceInfoReply(_message.Message):
    __slots__ = ("protocol", "server_instance_id", "model", "family", "blocks", "version", "sessions", "limits", "served_model_names", "budgets", "versions", "time_s")
    class BudgetsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    class VersionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    SERVER_INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    FAMILY_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    SERVED_MODEL_NAMES_FIELD_NUMBER: _ClassVar[int]
    BUDGETS_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    TIME_S_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    server_instance_id: str
    model: str
    family: str
    blocks: str
    version: int
    sessions: int
    limits: Limits
    served_model_names: _containers.RepeatedScalarFieldContainer[str]
    budgets: _containers.ScalarMap[str, str]
    versions: _containers.ScalarMap[str, str]
    time_s: float
    def __init__(self, protocol: _Optional[int] = ..., server_instance_id: _Optional[str] = ..., model: _Optional[str] = ..., family: _Optional[str] = ..., blocks: _Optional[str] = ..., version: _Optional[int] = ..., sessions: _Optional[int] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., served_model_names: _Optional[_Iterable[str]] = ..., budgets: _Optional[_Mapping[str, str]] = ..., versions: _Optional[_Mapping[str, str]] = ..., time_s: _Optional[float] = ...) -> None: ...

class ContributeRequest(_message.Message):
    __slots__ = ("session", "call", "step", "num_tokens", "client_sq_norm", "loss_scale", "num_positions", "barrier_version", "names", "gradients")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    CALL_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CLIENT_SQ_NORM_FIELD_NUMBER: _ClassVar[int]
    LOSS_SCALE_FIELD_NUMBER: _ClassVar[int]
    NUM_POSITIONS_FIELD_NUMBER: _ClassVar[int]
    BARRIER_VERSION_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    GRADIENTS_FIELD_NUMBER: _ClassVar[int]
    session: str
    call: int
    step: int
    num_tokens: int
    client_sq_norm: float
    loss_scale: float
    num_positions: int
    barrier_version: int
    names: _containers.RepeatedScalarFieldContainer[str]
    gradients: _containers.RepeatedCompositeFieldContainer[TensorMeta]
    def __init__(self, session: _Optional[str] = ..., call: _Optional[int] = ..., step: _Optional[int] = ..., num_tokens: _Optional[int] = ..., client_sq_norm: _Optional[float] = ..., loss_scale: _Optional[float] = ..., num_positions: _Optional[int] = ..., barrier_version: _Optional[int] = ..., names: _Optional[_Iterable[str]] = ..., gradients: _Optional[_Iterable[_Union[TensorMeta, _Mapping]]] = ...) -> None: ...

class ParametersRequest(_message.Message):
    __slots__ = ("follower", "server_instance_id", "version", "wait_s", "served_model_name")
    FOLLOWER_FIELD_NUMBER: _ClassVar[int]
    SERVER_INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    WAIT_S_FIELD_NUMBER: _ClassVar[int]
    SERVED_MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    follower: str
    server_instance_id: str
    version: int
    wait_s: float
    served_model_name: str
    def __init__(self, follower: _Optional[str] = ..., server_instance_id: _Optional[str] = ..., version: _Optional[int] = ..., wait_s: _Optional[float] = ..., served_model_name: _Optional[str] = ...) -> None: ...

class ParametersReply(_message.Message):
    __slots__ = ("server_instance_id", "version", "barrier_version", "names", "parameters")
    SERVER_INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    BARRIER_VERSION_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    server_instance_id: str
    version: int
    barrier_version: int
    names: _containers.RepeatedScalarFieldContainer[str]
    parameters: _containers.RepeatedCompositeFieldContainer[TensorMeta]
    def __init__(self, server_instance_id: _Optional[str] = ..., version: _Optional[int] = ..., barrier_version: _Optional[int] = ..., names: _Optional[_Iterable[str]] = ..., parameters: _Optional[_Iterable[_Union[TensorMeta, _Mapping]]] = ...) -> None: ...

class WorkReportRequest(_message.Message):
    __slots__ = ("session", "positions", "clipped", "refused", "quarantines")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    CLIPPED_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    QUARANTINES_FIELD_NUMBER: _ClassVar[int]
    session: str
    positions: int
    clipped: int
    refused: int
    quarantines: int
    def __init__(self, session: _Optional[str] = ..., positions: _Optional[int] = ..., clipped: _Optional[int] = ..., refused: _Optional[int] = ..., quarantines: _Optional[int] = ...) -> None: ...

class WorkReportReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
