"""What the server needs of a runtime: the public face as a protocol, so that tests can stand in for it."""

from collections.abc import Sequence
from typing import Any, Protocol

from prometheus_client import CollectorRegistry

from millrace.runtime.config import Config
from millrace.runtime.handle import RequestHandle
from millrace.runtime.types import ChatPrompt, Priority, SamplingParams, TextPrompt, TokensPrompt


class HealthFace(Protocol):
    """The state of a runtime at one moment."""

    @property
    def state(self) -> str: ...  # starting, ready, draining, failed or closed

    @property
    def progressing(self) -> bool: ...  # false when work waits and no step has finished for too long

    @property
    def reason(self) -> str: ...

    @property
    def running(self) -> int: ...

    @property
    def waiting(self) -> int: ...

    @property
    def seconds_since_progress(self) -> float: ...


class TokenizerFace(Protocol):
    """The one thing that the server asks of the tokenizer: text for a prompt that came as ids."""

    def decode(self, ids: Sequence[int], /, skip_special_tokens: bool = ...) -> str: ...


class RuntimeFace(Protocol):
    """A started `millrace.runtime.Runtime`."""

    @property
    def config(self) -> Config: ...

    @property
    def model_name(self) -> str: ...

    @property
    def max_model_len(self) -> int: ...

    @property
    def created(self) -> int: ...

    @property
    def tokenizer(self) -> TokenizerFace: ...

    @property
    def registry(self) -> CollectorRegistry: ...

    def submit(
        self,
        prompt: ChatPrompt | TextPrompt | TokensPrompt,
        sampling: SamplingParams | None = None,
        *,
        priority: Priority = ...,
        deadline: float | None = None,
        request_id: str | None = None,
        cache_salt: str = "",
    ) -> RequestHandle: ...

    def health(self) -> HealthFace: ...

    async def drain(self, timeout: float) -> bool: ...


JsonValue = Any  # a decoded JSON value whose type is checked where it is used
