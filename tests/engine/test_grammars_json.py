"""Whatever is sampled from the masks of a JSON schema, and ends, is valid by the schema."""

import json

import numpy as np
import pytest

from helpers.constraints import EOS, demo_bytes, factory, num_words
from helpers.schemas import random_document_schema
from nanovllm.engine.constraints import MakeConstraint, fill_masks

jsonschema = pytest.importorskip("jsonschema")
pytest.importorskip("llguidance")
NUM_SCHEMAS, NUM_GROUPS = 500, 4
MAX_TOKENS = 250
TEMPERATURE = 1.5


def sampled(makers: list[MakeConstraint], seed: int) -> list[bytes | None]:
    """A text from each, of random logits at a high temperature; None if it did not end in time.

    As time goes on, logits lean towards what closes strings, lists, objects and the text itself.
    """
    rng = np.random.default_rng(seed)
    leaning = np.array([t[:1] in (b'"', b"]", b"}") for t in demo_bytes()], dtype=np.float32)
    leaning[list(EOS)] = 1.5
    constraints = {row: make() for row, make in enumerate(makers)}
    texts: list[bytes | None] = [None] * len(makers)
    so_far = [b""] * len(makers)
    shifts = np.arange(32)
    for step in range(MAX_TOKENS):
        masks = np.empty((len(constraints), num_words()), dtype=np.int32)
        fill_masks(list(constraints.values()), masks)
        logits = rng.normal(0, 2, (len(masks), 800)).astype(np.float32) + leaning * step / 12
        noisy = logits / TEMPERATURE + rng.gumbel(size=logits.shape)  # its maximum is a sample
        is_allowed = (masks[:, :, None] >> shifts & 1).reshape(len(masks), -1).astype(bool)
        assert is_allowed.any(axis=1).all()
        chosen = np.where(is_allowed, noisy, -np.inf).argmax(axis=1).tolist()
        for row, token_id in zip(list(constraints), chosen):
            constraints[row].accept(token_id)
            so_far[row] += demo_bytes()[token_id]
            if token_id in EOS:
                assert constraints.pop(row).is_complete
                texts[row] = so_far[row]
        if not constraints:
            break
    return texts


@pytest.mark.parametrize("group", range(NUM_GROUPS))
def test_random_schemas_are_kept_to(group: int):
    seeds = range(group, NUM_SCHEMAS, NUM_GROUPS)
    schemas = [random_document_schema(seed) for seed in seeds]
    texts = sampled([factory(json=schema) for schema in schemas], group)
    for seed, schema, text in zip(seeds, schemas, texts):
        if text is not None:
            document = json.loads(text.decode())
            checker = jsonschema.Draft202012Validator(schema)
            assert checker.is_valid(document), (seed, schema, document)
    num_ended = sum(text is not None for text in texts)
    assert num_ended > 0.9 * len(texts)
    assert len({text for text in texts if text is not None}) > 0.5 * num_ended
