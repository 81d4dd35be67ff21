"""PURE. The product of a run's accumulators, which is an accumulator."""

from typing import Any, Self

from torch import Tensor

from saev_dist.accumulators.base import Accumulator, Codes, DeviceCodes


class Bundle(Accumulator):
    """Several accumulators that see the same batches.

    Args:
        parts: accumulators by name; the names prefix their state's.
    """

    STATE = ()

    def __init__(self, parts: dict[str, Accumulator]) -> None:
        self.parts = parts

    def update(self, codes: Codes) -> None:
        for part in self.parts.values():
            part.update(codes)

    def update_on_device(self, codes: DeviceCodes) -> None:
        for part in self.parts.values():
            part.update_on_device(codes)

    def flush(self) -> None:
        for part in self.parts.values():
            part.flush()

    def merge(self, other: Self) -> Self:
        self.check_same_kind(other)
        return type(self)({name: part.merge(other.parts[name]) for name, part in self.parts.items()})

    def state_dict(self) -> dict[str, Tensor]:
        return {f"{name}.{key}": tensor for name, part in self.parts.items() for key, tensor in part.state_dict().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.parts = {
            name: part.like({k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")})
            for name, part in self.parts.items()
        }

    def finalize(self, n_tokens: int) -> dict[str, Any]:
        self.flush()
        artifacts: dict[str, Any] = {"metrics": {}}
        for part in self.parts.values():
            for stem, content in part.finalize(n_tokens).items():
                if stem == "metrics":
                    assert not content.keys() & artifacts["metrics"].keys(), content
                    artifacts["metrics"] |= content
                else:
                    assert stem not in artifacts, stem
                    artifacts[stem] = content
        return artifacts
