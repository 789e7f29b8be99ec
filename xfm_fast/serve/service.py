"""Models, and the path of a request to one of them and back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from fastapi import Request
from torch import Tensor

from xfm_fast.errors import NonFiniteError
from xfm_fast.serve.images import check_image, decode_base64, fetch, is_url, web_client
from xfm_fast.serve.model import (
    Ability,
    Content,
    Reading,
    ServedModel,
    Work,
)
from xfm_fast.serve.options import ServiceOptions
from xfm_fast.serve.schema import ImageItem, Item, Problem
from xfm_fast.serve.work import Account, Batcher, Ledger
from xfm_fast.tasks.ranking import Ranker

# Bytes of a request whose texts are read at once, which takes less than handing them to a thread.
_QUICK_BYTES = 1 << 13

Items = Sequence[tuple[str, Item]]
"""Items of a request, with their names in errors."""


@dataclass(frozen=True)
class Result:
    """What a model computed for a request.

    Attributes:
        model: The model.
        work: The items as it read them.
        values: Features `[items, width]`, or scores `[pairs]` or `[pairs, labels]`, in float32.
        truncated: Names of the truncated texts.
    """

    model: ServedModel
    work: Work
    values: np.ndarray
    truncated: list[str]


class ModelService:
    """Models, the limits of requests to them, and the path of a request to a model and back.

    Args:
        models: The models that answer; a request that names none gets the first that can do it.
        options: See `ServiceOptions`.
        names: The model of each name in requests. [by `ServedModel.name`]
        observe: Gets the model, the number of requests and the tokens of each batch.

    Attributes:
        active: Requests between the arrival of the body and the response.
        warmed_up: All models have run once.
    """

    def __init__(
        self,
        models: Sequence[ServedModel],
        options: ServiceOptions,
        names: Mapping[str, ServedModel] | None,
        observe: Callable[[ServedModel, int, int], None],
    ) -> None:
        self.models, self.options = [*models], options
        self.names = dict(names or {model.name: model for model in models})
        self.ledger = Ledger(options.memory_mb << 20)
        self.active: set[Account] = set()
        self.warmed_up = False
        self._warming: asyncio.Task[None] | None = None
        self.batch_thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self.batchers = {
            model: Batcher(
                partial(_answer_batch, model),
                self.batch_tokens(model),
                coming=lambda: sum(not account.submitted for account in self.active),
                observe=partial(observe, model),
                thread=self.batch_thread,
            )
            for model in self.models
        }
        self.threads = ThreadPoolExecutor(8, thread_name_prefix="request")
        self._web = web_client() if options.allow_urls else None

    def batch_tokens(self, model: ServedModel) -> int:
        """Return the budget of a batch of a model."""
        return self.options.batch_tokens or model.batch_tokens

    def warm_up(self) -> asyncio.Task[None]:
        """Begin to run all models once, in the thread of batches; requests are accepted once this is done."""
        if self._warming is None:
            self._warming = asyncio.create_task(self._warm_up())
        return self._warming

    async def _warm_up(self) -> None:
        for model in self.models:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self.batch_thread, model.warm_up)
        self.warmed_up = True

    def close(self) -> None:
        """End the threads after their current work."""
        self.batch_thread.shutdown(wait=False, cancel_futures=True)
        self.threads.shutdown(wait=False, cancel_futures=True)

    def candidates(self, name: str | None) -> list[ServedModel]:
        """Return the model of a name, or all; raises `Problem` 404 for an unknown name."""
        if name is None:
            return self.models
        if name not in self.names:
            raise Problem(
                404,
                f"model {name!r} is not served here; use {', '.join(map(repr, self.names))}, or leave it out",
            )
        return [self.names[name]]

    def choose(self, name: str | None, *abilities: Ability) -> ServedModel:
        """Return the model of a name, else the first with the first of the abilities that any has."""
        candidates = self.candidates(name)
        for ability in abilities:
            for model in candidates:
                if ability in model.abilities:
                    return model
        who = f"model {name!r}" if name is not None else ", ".join(self.names)
        can = ", ".join(dict.fromkeys(can for model in candidates for can in model.abilities))
        raise Problem(
            422,
            f"{who} cannot {' or '.join(abilities)} (it can: {can}); serve or name a model that can",
        )

    async def compute(
        self,
        request: Request,
        model: ServedModel,
        lists: Mapping[str, Sequence[Item]],
        reading: Reading,
        answer_bytes: int = 0,
    ) -> Result:
        """Compute scores of pairs, or without pairs features of all items, within the limits of the request."""
        account, files = request.state.account, dict[str, bytes]()
        items = [
            (f"{name}[{index}]", item) for name in lists for index, item in enumerate(lists[name])
        ]
        is_text = [isinstance(item, str) for _, item in items]
        if self._web is not None and not all(is_text):
            urls = {
                name: item.image
                for name, item in items
                if isinstance(item, ImageItem) and is_url(item.image)
            }
            downloads = [
                asyncio.ensure_future(fetch(self._web, url, account)) for url in urls.values()
            ]
            try:
                files = dict(zip(urls, await asyncio.gather(*downloads), strict=True))
            finally:
                # After an error, the other downloads would go on.
                for download in downloads:
                    download.cancel()
        account.hold(answer_bytes)
        arguments = model, items, files, reading, account
        if model.quick and all(is_text) and account.received <= _QUICK_BYTES:
            work = self._read(*arguments)
        else:
            work = await account.run(self.threads, self._read, *arguments)
        limit = self.options.max_tokens
        if work.tokens > limit:
            raise Problem(
                422,
                f"the request has {work.tokens:,} tokens, over the limit of {limit:,} (--max-tokens); send fewer texts",
            )
        account.submitted = True
        values = await self.batchers[model].submit(work, model.cost(work), account.lease())
        return Result(model, work, values, [items[index][0] for index in work.truncated])

    def check_text(self, text: str, name: str) -> None:
        """Raise `Problem` 422 for a text over the limit of characters."""
        limit = self.options.max_characters
        if len(text) > limit:
            raise Problem(
                422,
                f"{name} has {len(text):,} characters, over the limit of {limit:,} (--max-characters); "
                "shorten it",
            )

    def _read(
        self,
        model: ServedModel,
        items: Items,
        files: Mapping[str, bytes],
        reading: Reading,
        account: Account,
    ) -> Work:
        """Make the work of a request, in any thread; `files` are downloaded images."""
        contents = list[Content]()
        needed: Callable[[], bool] = lambda: not account.ended  # noqa: E731
        for name, item in items:
            if isinstance(item, str):
                self.check_text(item, name)
                contents.append(item)
                continue
            account.check()
            content = files[name] if name in files else decode_base64(item.image, name)
            content, peak = check_image(content, name, account)
            picture = Ranker.picture(content, name)
            contents.append(picture._replace(name=name, peak=peak, needed=needed))
        names = [name for name, _ in items]
        work = model.read(contents, names, reading, account.check)
        return replace(work, needed=needed)


def _answer_batch(model: ServedModel, works: Sequence[Work]) -> list[np.ndarray | Exception]:
    results: list[np.ndarray | Exception] = []
    for result in model.answer(works):
        if isinstance(result, Tensor):
            result = result.numpy()
        if isinstance(result, np.ndarray) and not np.isfinite(result).all():
            result = NonFiniteError(
                "the results are not finite; the weights may need a wider dtype: use fp32"
            )
        results.append(result)
    return results
