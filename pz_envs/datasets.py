"""Where data files are, and how to get them: ``PZ_DATA``, then the user cache, then a download.

Nothing is downloaded unless ``get`` is called (``pz-envs data get NAME``); every download is
checked against a sha256 recorded here and lands whole or not at all. The data themselves are
nobody's but their authors': none of them ships with pz, and each row says under what licence they
are published. Story files are found by md5, so a folder of your own may name them as it likes.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pz_envs.errors import ConfigError, DataError, InfraError, did_you_mean
from pz_envs.files import sha256_file, write_atomic

_STORIES = "https://raw.githubusercontent.com/BYU-PCCL/z-machine-games/bfd7544/jericho-game-suite/"
_ZORK_MIT = (
    "https://raw.githubusercontent.com/historicalsource/zork1/"
    "97b7b3d68c075dd9af7da499c3e9690ada3471fd/"
)
_UFT = (
    "https://raw.githubusercontent.com/liumy2010/UFT/"
    "ad3c8ec7d258d4e4cf3f359dd75925d0f127a520/data/countdown/"
)

# Story files that BYU-PCCL/z-machine-games publishes and jericho supports: name, sha256.
_STORY_HASHES = """
905.z5 0f41ff7811668e236060b399ced1cd0481c1bb624a8876fc7e16dc58816f1ecb
acorncourt.z5 7b13c904bf7608fa0de902ce7ecd5fcd0e026f293fc67baa87b99a35a3190c9e
advent.z5 6179b5d5b17d692ec83fe64101ff8e4092390166c2b05063e7310eb976b93ea0
adventureland.z5 ca19b493a8190382a95b15c7645480ef467207ecaa0b446525f0328b89996777
afflicted.z8 5c3da938c7abde6a8a79d05c3b5e56bbfc5e905be65ef12ab0d6e78619527ca4
anchor.z8 c2f28a4ddd9367c260946926a33c73a4b0cc38b1f327646cc1202182a28a10ff
awaken.z5 0d50527323fabb6485abeb1043f2b2786c66b215936c79ca187cb662850ff9d1
balances.z5 10e717578f85200c6aadc8149d95e43f7b6c09fb473770d309a0d6afe3b29538
curses.z5 330100bf1c1ab8ed64065ceb58145ebb87cb6faef5b331fbc6684be4f14fe7da
deephome.z5 fdae5bd090fda6fc1b0390051531190968e04355060153ad5b2ab6b75a387b31
detective.z5 f6b0b9b5f4ff8890ab481b11e63ea18350b43640c88a9b8c23d6a2b269f9a040
dragon.z5 9f7d54f7c18ce07ec1c6eab7d5c2176f3562d46ffd2357f6d6cfc48a6fa683a8
enter.z5 4ff9a6206302fb775fae477e8e4c2f37d983cd771df9c3c92b80f12dbe397cfc
gold.z5 8fd863cfd601e227251daf4d985ba0c6db0f942ec256f09a3c9a81b995ace7c5
huntdark.z5 6197d094b3dff1118a1e130bb59deacb30c644610980881f8e66b854d6e2ccef
inhumane.z5 931b0be04ed43ca9791a809d567cba7ee27dc027f44a603f27e6180df938cf51
jewel.z5 59f600b6e55e7cf0b55edd8145fa80202b0b85d3c1eef9989796926962f21bd2
karn.z5 99cfd10988a2307c9cfbe17d0ac34f5d430d2086f2666355274e1c39c35dc1d0
library.z5 b3665eaf5e30520355a1f07657ffbd69e967ecb53942f86913d044e65fa30e11
loose.z5 a28b241778534c4d84749fb2192ba635269daaff7c20e8ed0fd30d85cfe4da96
lostpig.z8 7bffe25e933aa22a2b1e9bfc8073bee5687d79a70394da19e50bfed5755368c4
ludicorp.z5 b903da4b2f97117bea7814259a9df56d1e9b0f95d548c3a211dde2455e1fe2c8
moonlit.z5 6a3b57a3df1ffd4b72b5d7da17b31fde3db93a7640d6a94ddab249b07a7d71ef
murdac.z5 0dd018b9714356253cdf1c0e0a0269132a1c44d49a26c083a0964362fff87000
night.z5 134081ad18cf4c0fd643af8e7cd9a620955e45104ea4e1a96f70bb79745617d4
omniquest.z5 1c905ffce496afe702c04453c4abd0ab01e272afd138b87c7e0ebaed4d8accd0
partyfoul.z8 661d4a746b9a591579b125639e383dd80c99f20386386e847628423b8c2bb27f
pentari.z5 bbc8b30fa17089166698ed22740ab15be179babebec5252d07eb5260f1aa1316
reverb.z5 ed1b0f4d878c97d3a13c825313020b9c304e1a1db9e1b6ec0165ccf49a657c1f
snacktime.z8 04a681d20ce2701762eeb5adc1aace13d389d2319faaf9c497b9d9ca0eebff76
spirit.z5 258199e5fb7b494d3c6e60cc4fbe466b08f729e90a06753db49f4af7bfdca2d5
temple.z5 7378f6ce08153beb2f75b05054b70c4c4589a34c4f6f6295349115359dfb326f
theatre.z5 0fc8bdbfe929585cd0bb35883f511af5a61053f7fc8dfabdb32c7f10de5b7d80
tryst205.z5 37165a8a8a10949aa8005d57be2c4f686ea90ceceffb6c75d37ba8e1641ad51d
weapon.z5 eac87c5a94ef68b443a163015155589f9df50163291e47fe4263309303509030
yomomma.z8 d5e0a7e03709efe58989204f5e32052ded896be876c13b798ec01f97930d4d88
zenon.z5 cebb8710f287c9ae70cdbda0e04eb7b81f1740f041de0a0964cd8e28996ad439
zork1.z5 0ae5ac229e79094ff368b6669356444af0f35e21d862a1baaa546989085c15fd
zork2.z5 abf145d22371f825f13388587d92632bcde90582698f774b896b123a90e1fb1e
zork3.z5 dce7e6f757fb8379dea9da9c13cdda5412ba03fa9b70d79fb6b8c7faf5970692
"""

_BOXOBAN = (
    "https://raw.githubusercontent.com/google-deepmind/boxoban-levels/"
    "78011d8c86ad423bfb2e1005012393b4c3c24409/"
)
_HARNESS = "https://raw.githubusercontent.com/Zhuofeng-Li/math-evaluation-harness/"
_HARNESS_A = _HARNESS + "ba004e3d9d6b74521cbad30a6c3dce3bd80aa427/data/"
_HARNESS_B = _HARNESS + "1b9885d817962a8494728376625ce6605772edbd/data/"
_GSM8K_TRAIN = (
    "https://raw.githubusercontent.com/openai/grade-school-math/"
    "3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data/train.jsonl"
)
_DAPO = (
    "https://raw.githubusercontent.com/MasterVito/SvS/"
    "9fd8f35375b31b8632b52e715296c264a3ad4176/data/dapo_math_17k.parquet"
)
# Name, sha256, source.
_QUESTION_FILES = (
    (
        "aime24.jsonl",
        "af2b8bd2aa911b6333ad0df32f3ca05c7ae8ed10f1731f4372c8ae26990bf7ac",
        _HARNESS_A + "aime24/test.jsonl",
    ),
    (
        "amc23.jsonl",
        "43707e1ca784602d8479de24ee8ce36609dbebc46dd152b0b12a46611aa898a4",
        _HARNESS_A + "amc23/test.jsonl",
    ),
    (
        "math500.jsonl",
        "35dc41080a3680858b27fa7e0533d2d547825316fc5dafe5d316f4ccc5a06132",
        _HARNESS_B + "math500/test.jsonl",
    ),
    (
        "minerva_math.jsonl",
        "0e656b430d3a0a1dab6aa853f453ba3805e28e2cabe4fc72486a897cc09d8ba2",
        _HARNESS_B + "minerva_math/test.jsonl",
    ),
    (
        "gsm8k_test.jsonl",
        "9f098df7ff4522078d6ccec27a5c38a454790fdb51131bedfaa0e490070d5394",
        _HARNESS_B + "gsm8k/test.jsonl",
    ),
    (
        "gsm8k_train.jsonl",
        "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
        _GSM8K_TRAIN,
    ),
    (
        "dapo_math_17k.parquet",
        "246ae23df97c9eae8126cb4da780e9a0a31d10110e16eed144bcecbf2132d535",
        _DAPO,
    ),
)
_LEVEL_HASHES = """
unfiltered/test/000.txt 272928a4e7c185fdf84daa523b298750b6ff08703cb0c20d3be7eff93acc5256
unfiltered/train/000.txt 674dda499261deface252c90077ae67181b5c7704c235baf0dd0bd2d16bf072e
unfiltered/train/001.txt 5da3fe47340a1ea2683af09e99b31b3d2c3454c29c9d746c3b72d9d78375a869
unfiltered/valid/000.txt 52cd811af721d69eef71a4e3cfc40cd4f635269a8e26d42ec017aa43af02b8a9
medium/train/000.txt b44e6dac95d03c0f29158252eafe7b1d97a3f3b447743a23617efa66e735167b
medium/valid/000.txt b30ccde2aeb8192a0b49e53a016fe744ae4a67eb01560b1d0bec251695e03e5b
hard/000.txt c320e8b1f5a26be7a85dff18147a7decae3c5e765c38ff56e30ebf8551d331f4
hard/001.txt 713f1b629f44e5203eb129948778439f4ab417680a4c65d58bb7c6530d4988fb
hard/002.txt 4e151e4e45fa3d1b2f2863d170b66fa97e103436cef7b98fd9cc23d1ddeec8bc
hard/003.txt ed472bfcdcc06bb1c9a8ceeb2a6611842b182c019c04e95a4851fcdf70170e25
"""


@dataclass(frozen=True, slots=True)
class DataFile:
    """One file: its name below the data set's folder, the sha256 it must have, its source.

    With ``rows`` the source is Parquet whose first rows are rewritten as Countdown-Tasks JSONL;
    the sha256 is then that of the JSONL text before compression.
    """

    name: str
    sha256: str
    url: str
    rows: int | None = None


@dataclass(frozen=True, slots=True)
class Dataset:
    """Files that belong together, the folder they live in below a data root, and their licence."""

    name: str
    title: str
    folder: str
    licence: str
    files: tuple[DataFile, ...]


DATASETS: Mapping[str, Dataset] = {
    row.name: row
    for row in (
        Dataset(
            "jericho",
            "Z-machine story files that jericho supports (BYU-PCCL/z-machine-games at bfd7544)",
            "jericho",
            "each author's own: mostly freeware, zork1-3 proprietary (Infocom, now Microsoft)",
            tuple(
                DataFile(name, digest, _STORIES + name)
                for name, digest in (line.split() for line in _STORY_HASHES.split("\n") if line)
            ),
        ),
        Dataset(
            "zork_mit",
            "Zork I release 119 (historicalsource/zork1 at 97b7b3d)",
            "jericho/zork_mit",
            "MIT, (c) 2025 Microsoft",
            (
                DataFile(
                    "zork1.z3",
                    "37084966477dff679282de42974b2077156b1bd68fad92a65d4ea94d8eb64d79",
                    _ZORK_MIT + "COMPILED/zork1.z3",
                ),
            ),
        ),
        Dataset(
            "countdown",
            "10,240 train and 1,024 test rows of Countdown-Tasks-3to4 (liumy2010/UFT at ad3c8ec)",
            "countdown",
            "Apache-2.0",
            (
                DataFile(
                    "countdown_train_first10240.jsonl.gz",
                    "09e30ea4b9879c32d51ac733f9fa4d284c77ce49754a797f612fa29aafa9d871",
                    _UFT + "train.parquet",
                    rows=10240,
                ),
                DataFile(
                    "countdown_test1024_UFT.jsonl.gz",
                    "f8041880f98993303e2d55e2419a3578e398d5cbcbdbef0afbed62a976f0d0ce",
                    _UFT + "test.parquet",
                    rows=1024,
                ),
            ),
        ),
        Dataset(
            "boxoban",
            "Boxoban levels (google-deepmind/boxoban-levels at 78011d8)",
            "boxoban",
            "Apache-2.0",
            tuple(
                DataFile(name, digest, _BOXOBAN + name)
                for name, digest in (line.split() for line in _LEVEL_HASHES.split("\n") if line)
            ),
        ),
        Dataset(
            "math",
            "DAPO-Math-17k, AIME24, AMC23, MATH-500, GSM8K, Minerva",
            "math",
            "DAPO Apache-2.0; GSM8K and MATH MIT; AIME and AMC texts (c) MAA; Minerva not stated",
            tuple(DataFile(name, digest, url) for name, digest, url in _QUESTION_FILES),
        ),
    )
}
"""Every data set that pz knows, by name."""


def cache_dir() -> Path:
    """Return (and create) pz's cache: ``$PZ_CACHE``, ``$XDG_CACHE_HOME/pz`` or ``~/.cache/pz``.

    Raises:
        InfraError: the folder cannot be created.
    """
    folder = _cache_path()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InfraError(
            f"cannot create the cache folder {folder} ({error.strerror}). "
            "Name one that can be written: export PZ_CACHE=/some/folder"
        ) from error
    return folder


def download_root() -> Path:
    """Return the folder that downloads go to, ``data`` in the cache; it need not exist yet."""
    return _cache_path() / "data"


def data_root() -> Path | None:
    """Return ``$PZ_DATA`` if set, else the download folder if it exists, else None.

    Raises:
        DataError: ``PZ_DATA`` names a folder that does not exist.
    """
    return next(iter(_roots()), None)


def find_file(dataset: str, name: str) -> Path | None:
    """Return the first file ``name`` of ``dataset`` in ``$PZ_DATA`` or the cache, or None.

    Args:
        dataset: a name in ``DATASETS``, or a folder below the data root.
        name: the file's name below that folder.
    """
    folder = DATASETS[dataset].folder if dataset in DATASETS else dataset
    paths = (root / folder / name for root in _roots())
    return next((path for path in paths if path.is_file()), None)


def find_story(md5: str) -> Path | None:
    """Return a file with this md5 anywhere below a ``jericho`` folder, or None."""
    for root in _roots():
        for path in sorted((root / "jericho").rglob("*.z*")):
            if path.is_file() and _md5(path) == md5:
                return path
    return None


def dataset_for(name: str) -> tuple[Dataset, tuple[DataFile, ...]]:
    """Return the data set and files that ``name`` means: a data set, or ``dataset/file``.

    Raises:
        ConfigError: no such data set or file; the message names the nearest.
    """
    key, _, member = name.partition("/")
    if key not in DATASETS:
        known = ", ".join(DATASETS)
        raise ConfigError(f"No data set `{key}`.{did_you_mean(key, DATASETS)} Known: {known}")
    dataset = DATASETS[key]
    files = tuple(file for file in dataset.files if not member or file.name == member)
    if not files:
        names = [file.name for file in dataset.files]
        raise ConfigError(f"Data set `{key}` has no `{member}`.{did_you_mean(member, names)}")
    return dataset, files


def get(name: str, *, on_progress: Callable[[int, int, str], None] | None = None) -> Path:
    """Download what is not here yet, check it, and return the folder that holds the first file.

    A file that is already found with the right content is not fetched again.

    Args:
        name: a name in ``DATASETS``, or ``dataset/file`` for one file.
        on_progress: called with (files done, files in all, name of the next file).

    Raises:
        ConfigError: no such data set.
        InfraError: the cache folder cannot be created.
        DataError: no network, or the bytes that came are not the recorded ones.
    """
    dataset, files = dataset_for(name)
    folder = cache_dir() / "data" / dataset.folder
    for number, file in enumerate(files):
        if on_progress is not None:
            on_progress(number, len(files), file.name)
        if is_present(dataset, file):
            continue
        write_atomic(folder / file.name, _fetch(dataset, file, folder))
    if on_progress is not None:
        on_progress(len(files), len(files), "")
    first = find_file(dataset.name, files[0].name)
    return folder if first is None else first.parent


def is_present(dataset: Dataset, file: DataFile) -> bool:
    """Return whether ``file`` is found with exactly the recorded content."""
    path = find_file(dataset.name, file.name)
    if path is None:
        return False
    if file.rows is None:
        return sha256_file(path) == file.sha256
    import gzip

    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError):
        return False
    return hashlib.sha256(content).hexdigest() == file.sha256


def _fetch(dataset: Dataset, file: DataFile, folder: Path) -> bytes:
    content = _download(dataset, file, folder)
    if file.rows is not None:
        import gzip

        from pz_envs.countdown.tasks import jsonl_from_parquet

        content = jsonl_from_parquet(content, file.rows)
        _verify(file, content)
        return gzip.compress(content, mtime=0)
    _verify(file, content)
    return content


def _download(dataset: Dataset, file: DataFile, folder: Path) -> bytes:
    import http.client
    import urllib.error
    import urllib.request

    try:
        with urllib.request.urlopen(file.url, timeout=30) as response:
            return bytes(response.read())
    except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
        reason = getattr(error, "reason", None) or error
        raise DataError(
            f"could not download {file.name} from {file.url} ({reason}). With a network, run: "
            f"pz-envs data get {dataset.name}   Without one, put the file at "
            f"{folder / file.name}, or set PZ_DATA to a folder that holds "
            f"{dataset.folder}/{file.name}"
        ) from error


def _verify(file: DataFile, content: bytes) -> None:
    digest = hashlib.sha256(content).hexdigest()
    if digest != file.sha256:
        raise DataError(
            f"{file.url} gave other bytes than recorded for {file.name}: sha256 {digest}, expected "
            f"{file.sha256}. Nothing was written; try again, or set PZ_DATA to a folder that has it"
        )


def _cache_path() -> Path:
    chosen = os.environ.get("PZ_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "pz"


def _roots() -> Iterator[Path]:
    chosen = os.environ.get("PZ_DATA")
    if chosen:
        root = Path(chosen).expanduser()
        if not root.is_dir():
            raise DataError(
                f"PZ_DATA is {chosen!r}, which is not a folder. Set it to a folder of data sets, "
                "or unset it: unset PZ_DATA"
            )
        yield root
    downloads = download_root()
    if downloads.is_dir():
        yield downloads


def _md5(path: Path) -> str:
    status = path.stat()
    return _md5_of_version(str(path), status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=4096)
def _md5_of_version(path: str, size: int, mtime_ns: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()
