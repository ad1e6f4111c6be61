"""A pytest plugin for diffusers' own tests: a small T5 made here in place of the one that they take from the hub."""

from __future__ import annotations

from typing import Any

import transformers

from cogx_fast.assets.recipe import vocabulary

_NAME = "hf-internal-testing/tiny-random-t5"


def _config() -> Any:
    return transformers.T5Config(vocab_size=len(vocabulary()), d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4)


_MADE = {
    transformers.AutoConfig: _config,
    transformers.AutoTokenizer: lambda: transformers.T5Tokenizer(vocab=vocabulary(), extra_ids=0),
    transformers.T5EncoderModel: lambda: transformers.T5EncoderModel(_config()).eval(),
}


def _replace(kind: Any, make: Any) -> None:
    load = kind.from_pretrained

    def from_pretrained(name: Any, *arguments: Any, **options: Any) -> Any:
        return make() if str(name) == _NAME else load(name, *arguments, **options)

    kind.from_pretrained = from_pretrained


for _kind, _make in _MADE.items():
    _replace(_kind, _make)
