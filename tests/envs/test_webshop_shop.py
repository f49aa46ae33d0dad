from __future__ import annotations

import functools
import gzip
import json
import os
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pz_envs.datasets import find_file
from pz_envs.errors import ConfigError, DataError
from pz_envs.webshop import importing, indexing, layout, search
from pz_envs.webshop.analyzer import terms, words
from pz_envs.webshop.build import build_shop
from pz_envs.webshop.env import WebShopEnv
from pz_envs.webshop.importing import JsonStream, import_files
from pz_envs.webshop.indexing import decoded_length
from pz_envs.webshop.porter import stem
from pz_envs.webshop.products import Product
from pz_envs.webshop.search import SearchIndex
from pz_envs.webshop.store import Shop, open_shop

GOLDEN = (
    Path(os.environ.get("PZ_DATA", "/nonexistent")).parent / "golden" / "webshop_transcripts.tar.xz"
)


def _product(asin: str, text: str) -> Product:
    return Product(
        asin=asin,
        title=text,
        description="",
        bullets=(),
        pricing=(5.0,),
        price_text="$5.0",
        options={},
        attributes=("x",),
        category="c",
        query="q",
        product_category="a › b",
        nouns=(),
    )


def _shop(folder: Path, texts: Mapping[str, str]) -> Shop:
    build_shop((_product(*one) for one in texts.items()), folder, name="s", nouns="given")
    return Shop(layout.open_folder(folder, "Build it again."))


class _Plain:
    """The formula over every document, in plain numpy: what search must equal to the bit."""

    def __init__(self, texts: Mapping[str, str]) -> None:
        self._asins = sorted(texts)
        counts = [Counter(terms(texts[asin])) for asin in self._asins]
        lengths = [count.total() for count in counts]
        self._size = np.count_nonzero(lengths)
        average = np.float32(sum(lengths) / max(1, self._size))
        coded = np.array([decoded_length(one) for one in lengths], dtype=np.float32)
        k1, b, one = np.float32(0.9), np.float32(0.4), np.float32(1)
        self._norms = k1 * ((one - b) + b * coded / average)
        self._postings: dict[str, list[tuple[int, int]]] = {}
        for document, count in enumerate(counts):
            for term, times in count.items():
                self._postings.setdefault(term, []).append((document, times))

    def search(self, query: str) -> tuple[str, ...]:
        scores = np.zeros(len(self._asins))
        for term, times in Counter(terms(query)).items():
            pairs = np.array(self._postings.get(term, []), dtype=np.int64).reshape(-1, 2)
            documents, tf = pairs[:, 0], pairs[:, 1].astype(np.float64)
            share = (tf / (tf + self._norms[documents])).astype(np.float32)
            weight = np.float32(np.log(1 + (self._size - len(tf) + 0.5) / (len(tf) + 0.5)))
            scores[documents] += share * (weight * np.float32(times))
        single = scores.astype(np.float32)
        hits = np.flatnonzero(single)
        order = np.argsort(-single[hits], kind="stable")[: search.TOP]
        return tuple(self._asins[document] for document in hits[order])


def _queries(shop: Shop, count: int) -> Iterator[str]:
    """Yield titles, instructions, parts of them, and random words of the shop."""
    rng = random.Random(7)
    goals, _ = shop.goals("synthetic", 0)
    vocabulary = " ".join(one.indexed_text() for one in shop.products.values()).split()
    for _ in range(count // 5):
        goal = goals[rng.randrange(len(goals))]
        said = goal.instruction_text.split()
        yield from (goal.name, goal.instruction_text, goal.query)
        yield " ".join(rng.sample(said, min(3, len(said))))
        yield " ".join(rng.choices(vocabulary, k=rng.randint(1, 8)))


@functools.cache
def _plain(shop: Shop) -> _Plain:
    return _Plain({asin: one.indexed_text() for asin, one in shop.products.items()})


def _assert_same_ranking(shop: Shop, count: int) -> None:
    plain = _plain(shop)
    for query in _queries(shop, count):
        assert shop.search(query) == plain.search(query), query


@pytest.mark.data
@pytest.mark.parametrize("small", [50_000, 0])
def test_the_ranking_of_real_products_is_that_of_scoring_every_document(
    small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if find_file("webshop", "products_1000.jsonl.gz") is None:
        pytest.skip("webshop/products_1000.jsonl.gz is not here")
    monkeypatch.setattr(search, "SMALL", small)
    shop = open_shop("products_1000", None)
    shop._cached_search.cache_clear()
    _assert_same_ranking(shop, 400)


def test_skipping_documents_never_changes_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "SMALL", 0)
    monkeypatch.setattr(search, "_LET_GO_AFTER", 0)
    shop = open_shop("builtin", 1000)
    shop._cached_search.cache_clear()
    skipped = []
    keep = SearchIndex._add_to
    monkeypatch.setattr(
        SearchIndex, "_add_to", lambda self, *rest: skipped.append(1) or keep(self, *rest)
    )
    _assert_same_ranking(shop, 200)
    assert len(skipped) > 100
    assert not shop._index._scores.any()


def test_where_sums_could_round_terms_are_taken_in_the_query_s_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(search, "SMALL", 0)
    monkeypatch.setattr(search, "_EXACT_EXPONENTS", 0)
    shop = open_shop("builtin", 300)
    shop._cached_search.cache_clear()
    _assert_same_ranking(shop, 100)


def test_scores_are_bm25_and_equal_ones_go_by_asin(tmp_path: Path) -> None:
    shop = _shop(
        tmp_path / "few",
        {"B3": "red mug", "B1": "red mug", "B2": "red red red cup", "B4": "green", "B5": ""},
    )
    assert shop.search("red") == ("B2", "B1", "B3")
    assert shop.search("mugs") == ("B1", "B3")
    assert shop.search("the unknown") == ()
    assert shop.search("cup mug mug mug") == ("B1", "B3", "B2")
    assert shop.search("cup mug")[0] == "B2"
    assert list(shop.products) == ["B3", "B1", "B2", "B4", "B5"]
    assert "B6" not in shop.products
    assert shop.products["B4"].title == "green"
    many = _shop(tmp_path / "many", {f"B{number:03}": "mug" for number in range(80, 0, -1)})
    assert many.search("mug") == tuple(f"B{number:03}" for number in range(1, 51))


def test_a_shop_without_a_single_word_finds_nothing(tmp_path: Path) -> None:
    assert _shop(tmp_path / "s", {"B1": "", "B2": "the"}).search("mug the") == ()


def test_many_short_runs_make_the_index_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(3)
    alphabet = [f"word{number}" for number in range(60)] + ["été", "日本", "x" * 300]
    texts = {
        f"B{number}": " ".join(rng.choices(alphabet, k=rng.randint(0, 90))) for number in range(90)
    }
    _shop(tmp_path / "one", texts)
    monkeypatch.setattr(indexing, "_RUN_TOKENS", 100)
    monkeypatch.setattr(indexing, "_MERGE_POSTINGS", 37)
    monkeypatch.setattr(indexing, "_CHUNKS_KEPT", 5)
    shop = _shop(tmp_path / "many", texts)
    plain = _Plain(texts)
    for query in (*alphabet, "word1 word2 word2 word50", " ".join(alphabet)):
        assert shop.search(query) == plain.search(query)
    one, many = (
        sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("one", "many")
    )
    assert one == many


def test_concurrent_searches_do_not_mix(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    shop = open_shop("builtin", 300)
    queries = list(dict.fromkeys(_queries(shop, 60)))
    expected = [shop._search(query) for query in queries]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            assert list(pool.map(shop._search, queries)) == expected


def test_the_catalogue_is_the_edition_that_old_copies_hold() -> None:
    # Another fingerprint means other products: raise catalogue.EDITION and put the new one here.
    assert open_shop("builtin", 50).fingerprint == "a3e453984851a867"


@pytest.mark.parametrize(
    "name", ["products", "documents", "codes", "terms", "asins", "header.json"]
)
def test_a_file_cut_short_is_named_with_what_to_do(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "shop"
    _shop(folder, {"B1": "red mug", "B2": "blue mug"})
    path = folder / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=rf"{name}.*import-webshop"):
        WebShopEnv(source=str(folder))
    path.unlink()
    wanted = "No WebShop data|exactly one" if name == "header.json" else f"{name} is missing"
    with pytest.raises(DataError, match=wanted):
        WebShopEnv(source=str(folder))


def test_changed_bytes_are_found(tmp_path: Path) -> None:
    folder = tmp_path / "shop"
    shop = _shop(folder, {"B1": "red mug", "B2": "blue mug"})
    layout.verify(folder, "Again.")
    blob = bytearray((folder / "products").read_bytes())
    blob[5] ^= 0xFF
    (folder / "products").write_bytes(blob)
    with pytest.raises(DataError, match=r"products is damaged.*sha256"):
        layout.verify(folder, "Again.")
    with pytest.raises(DataError, match=r"products is damaged \(product 0"):
        list(shop.products.values())
    header = (folder / "header.json").read_text()
    (folder / "header.json").write_text(header.replace('"filled": 2', '"filled": 3'))
    with pytest.raises(DataError, match="checksum"):
        layout.open_folder(folder, "Again.")
    (folder / "header.json").write_text(header.replace('"version": 1', '"version": 99'))
    with pytest.raises(DataError, match=r"version 99.*reads 'pz-webshop' version 1"):
        layout.open_folder(folder, "Again.")


def test_an_interrupted_build_leaves_nothing(tmp_path: Path) -> None:
    def stopping() -> Iterator[Product]:
        for number in range(100):
            yield _product(f"B{number}", "red mug")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_shop(stopping(), tmp_path / "shop", name="s", nouns="given")
    assert list(tmp_path.iterdir()) == []


def test_the_first_of_two_builders_wins(tmp_path: Path) -> None:
    target = tmp_path / "shop"

    def slow() -> Iterator[Product]:
        yield _product("B1", "red mug")
        _shop(target, {"B2": "blue mug"})

    build_shop(slow(), target, name="s", nouns="given")
    assert list(Shop(layout.open_folder(target, "")).products) == ["B2"]
    assert [path.name for path in tmp_path.iterdir()] == ["shop"]


def _sources(folder: Path, suffix: str = "") -> list[dict[str, Any]]:
    """Write the original's three files with two products; return the records."""
    records = [
        {
            "asin": asin,
            "name": f"{color} Mug \ud83d\ude00",
            "category": "garden",
            "query": "mugs",
            "product_category": "Home › Mugs",
            "pricing": "$12.50",
            "small_description": ["Holds tea"],
            "full_description": "A mug.",
            "customization_options": None,
            "reviews": [{"text": "[{"}],
        }
        for asin, color in (("B1", "Red"), ("B2", "Blue"))
    ]
    mined = {"B2": {"attributes": ["dishwasher safe"]}, "B9": {"attributes": ["x"]}}
    people = {
        "B2": [
            {
                "instruction": "i want a mug.",
                "instruction_attributes": ["dishwasher safe"],
                "instruction_options": [],
            }
        ]
    }
    folder.mkdir(exist_ok=True)
    for name, value in (
        ("items_shuffle_1000.json", records),
        ("items_ins_v2_1000.json", mined),
        ("items_human_ins.json", people),
    ):
        data = json.dumps(value, indent=2).encode()
        (folder / f"{name}{suffix}").write_bytes(gzip.compress(data) if suffix else data)
    return records


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_an_imported_shop_is_the_folder_it_came_from(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PZ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(importing, "_CHUNK", 11)
    source, target = tmp_path / "source", tmp_path / "shop"
    _sources(source, suffix)
    told: list[tuple[int, float]] = []
    import_files(source, target, on_progress=lambda *one: told.append(one))
    assert told == [(2, 1.0)]
    imported, plain = open_shop(str(target), None), open_shop(str(source), None)
    assert dict(imported.products) == dict(plain.products)
    assert imported.fingerprint == plain.fingerprint
    assert imported.products["B2"].attributes == ("dishwasher safe",)
    assert imported.products["B1"].attributes == ("DUMMY_ATTR",)
    env = WebShopEnv(source=str(target), split="all")
    env.reset(options={"index": 0})
    env.step("search[blue mug]")
    env.step("click[b2]")
    assert env.step("click[buy now]")[4]["success"]
    with pytest.raises(ConfigError, match="not empty"):
        import_files(source, target)
    with pytest.raises(ConfigError, match="leave num_products out"):
        WebShopEnv(source=str(target), num_products=1)
    import_files(source, tmp_path / "one", num_products=1)
    assert list(open_shop(str(tmp_path / "one"), None).products) == ["B1"]


def test_broken_source_files_are_named_and_leave_nothing(tmp_path: Path) -> None:
    source = tmp_path / "source"
    _sources(source)
    items = source / "items_shuffle_1000.json"
    whole = items.read_text()
    for text, problem in (
        (whole[:-40], "items_shuffle_1000.json is not JSON"),
        (whole + "]", "more after its end"),
        (whole.replace('},\n  {\n    "asin"', '}\n  {\n    "asin"'), "expected , or ]"),
        (f'{{"a": {whole}}}', r"expected \["),
        (whole.replace('"query": "mugs"', '"query": 5'), r"record 0 \(asin 'B1'\)"),
        ("[]", "holds no products"),
        ("[" * 200_000, "nested too deeply|not JSON"),
    ):
        items.write_text(text)
        with pytest.raises(DataError, match=problem):
            import_files(source, tmp_path / "shop")
    items.write_bytes(b'["\xff"]')
    with pytest.raises(DataError, match="cannot be read"):
        import_files(source, tmp_path / "shop")
    with pytest.raises(DataError, match="no folder"):
        import_files(tmp_path / "nowhere", tmp_path / "shop")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
_WHOLE = st.lists(_VALUES) | st.dictionaries(st.text(max_size=3), _VALUES)


@settings(max_examples=60)
@given(value=_WHOLE, chunk=st.integers(1, 9))
def test_streaming_reads_what_json_reads(
    value: Any, chunk: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "streamed.json"
    path.write_text(json.dumps(value, indent=chunk % 3 or None), encoding="utf-8")
    before, importing._CHUNK = importing._CHUNK, chunk
    try:
        pairs = list(JsonStream(path).members("[" if isinstance(value, list) else "{"))
    finally:
        importing._CHUNK = before
    read: Iterable[Any] = [one for _, one in pairs] if isinstance(value, list) else dict(pairs)
    assert read == value


def test_a_long_file_is_never_held_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importing, "_CHUNK", 256)
    path = tmp_path / "long.json"
    path.write_text(json.dumps([{"text": "x" * 100}] * 2000))
    stream = JsonStream(path)
    longest = max(len(stream._text) for _ in stream.members("["))
    assert longest < 1024
    assert stream.share == 1.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("can't stop 3.5mm x:y 1,000 a.b end.", "can't stop 3.5mm x:y 1,000 a.b end"),
        ("snake_case __ _x_ 12\"x14'", "snake_case _x_ 12 x14"),
        ("brand™ ★new 日本語 カタカナ ひら", "brand ™ ★ new 日 本 語 カタカナ ひ ら"),
        ("naïve cafe\u0301 a,b 1.a", "naïve cafe\u0301 a b 1 a"),
        ("x" * 300, f"{'x' * 255} {'x' * 45}"),
    ],
)
def test_words_follow_the_unicode_rules(text: str, expected: str) -> None:
    assert words(text) == expected.split(" ")


def test_terms_drop_stop_words_and_possessives() -> None:
    assert terms("The women's SHOES, and the Men’s IN it's") == ["women", "shoe", "men"]


def test_stems_are_porter_s() -> None:
    pairs = """
        caresses caress ponies poni cats cat feed feed agreed agre plastered plaster motoring motor
        sing sing conflated conflat troubling troubl sized size hopping hop falling fall hissing
        hiss filing file happy happi sky sky relational relat conditional condit radically radic
        vietnamization vietnam hopefulness hope electriciti electr electrical electr goodness good
        revival reviv adoption adopt probate probat rate rate controll control roll roll
        archaeology archaeolog possibly possibl is is
    """
    cells = pairs.split()
    assert [stem(word) for word in cells[::2]] == cells[1::2]


def test_lengths_pass_through_lucene_s_byte() -> None:
    exact = [decoded_length(length) for length in range(40)]
    assert exact == list(range(40))
    coded = {41: 40, 55: 54, 57: 56, 134: 128, 1000: 984, 5000: 4632}
    assert {length: decoded_length(length) for length in coded} == coded
