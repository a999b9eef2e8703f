"""The published pairs: their files, the sha256 of each, and where the public originals are.

All are cuts of the Amazon product data, 2014 release (R. He and J. McAuley, WWW 2016; J. McAuley et al., SIGIR 2015),
restricted to users active in both domains, but for the open pair, which has users of one domain beside them.
"""

from __future__ import annotations

from dataclasses import dataclass

# Food-Kitchen and Beauty-Electronics as the authors of ABXI (arXiv 2501.15118) cut them, at the commit of the hashes.
ABXI_DATA = "https://raw.githubusercontent.com/DiMarzioBian/ABXI/72e52c9f85c740cb5dbdab11f7e5a70eb28ae00d/data"


@dataclass(frozen=True)
class Source:
    """One published file.

    Attributes
    ----------
    path
        Below the data folder, gzipped.
    sha256
        Of the gzipped file.
    content_sha256
        Of its content, which is also what `url` delivers: it tells a file that was packed anew from a wrong one.
    url
        The public original, or None for a file that was cut from several originals and has no public copy.
    """

    path: str
    sha256: str
    content_sha256: str
    url: str | None = None

    @property
    def plain_path(self) -> str:
        """Name of the unpacked file, as it is kept in the cache."""
        return self.path.removesuffix(".gz")


@dataclass(frozen=True)
class Published:
    """A pair with a name: its domains, its sequences and its map of items."""

    domains: tuple[str, str]
    events: Source
    items: Source

    @property
    def files(self) -> tuple[Source, Source]:
        """What has to be there."""
        return self.events, self.items


@dataclass(frozen=True)
class Open:
    """A pair cut from two single-domain files: all users of both domains, and a fixed sample of those of one."""

    domains: tuple[str, str]
    files: tuple[Source, Source]
    one_domain_users: int


@dataclass(frozen=True)
class TextSource:
    """A file of item texts, JSON `{"ASIN": "text" or ["text", ...]}`, and what kind of text it holds."""

    kind: str
    file: Source


# "electronic-phone" is the per-domain file: it is the one near the size of the pair in the paper's table (3499 users
# against 1461), and the one CDSRNP and LLM4CDSR's domain streams can be judged on. What needs one stream in time order
# runs on "electronic-phone-ts", a cut with a common clock whose users are a biased sample (they come from
# Beauty-Electronics). "sport-phone" is an extra pair with a common clock, and "sport-phone-open" the same two domains
# with users of one domain, for whom CDSRNP was made.
PAIRS: dict[str, Published | Open] = {
    "food-kitchen": Published(
        ("food", "kitchen"),
        Source(
            "food-kitchen/afk_50_preprocessed.txt.gz",
            "12f82ca3c345a0c93ae7f4104210b46c1f43e55732ac96c494555c6f8276ecb7",
            "5f9856f574879920a70c93461add1ebc1c997b1ce6d626ba8d475315f53a4a15",
            f"{ABXI_DATA}/afk/afk_50_preprocessed.txt",
        ),
        Source(
            "food-kitchen/map_item_50.txt.gz",
            "90deca42c653466810ec935c014b8c2e552e12332f4e1baf068f3c25ea6cbfb6",
            "64a939f71c0c48ba181d6d24e384af1160812bdf244f20c58ef101f5fc54b3c3",
            f"{ABXI_DATA}/afk/map_item_50.txt",
        ),
    ),
    "beauty-electronics": Published(
        ("beauty", "electronics"),
        Source(
            "beauty-electronics/abe_50_preprocessed.txt.gz",
            "9feffefad5bed786cb1009beb8e2ee3c9d26ac6253d20c715d35b05ff7787871",
            "e13235003725700fdc709eb78a8865bd7e4ab75dc28ae569f7a4cebcdab1e33b",
            f"{ABXI_DATA}/abe/abe_50_preprocessed.txt",
        ),
        Source(
            "beauty-electronics/map_item_50.txt.gz",
            "b2e992601ff91f02aafbd8e0d1e4f291fd32ae84cd22d8a6f59a33f3f86363c8",
            "4e144f3fea1a5e8037cd56167a084ce4d73c6ccc123187055470b3da9818de74",
            f"{ABXI_DATA}/abe/map_item_50.txt",
        ),
    ),
    "cloth-sport": Published(
        ("cloth", "sport"),
        Source(
            "cloth-sport/cloth_sport_perdomain.txt.gz",
            "0ce78fb85870ed844974054717a740c8ba306b3f861f2f98896a6c69f2b8427d",
            "791e7b9a3f3a75c2eb2b4a8fa4b67e2724d569844fd35b9a2860b25487c2de5e",
        ),
        Source(
            "cloth-sport/map_item.json.gz",
            "075cefa8a13ef5d00ce979d7b02cf3a2a6a6190f8944c6e8ca57a3f1ee999d33",
            "53e2f2fa16f7102d0acd2ee153cde92285f6f300a77ed31dbc4698ef63717bd0",
        ),
    ),
    "electronic-phone": Published(
        ("electronic", "phone"),
        Source(
            "electronic-phone/electronic_phone_perdomain.txt.gz",
            "5a9d54a6a7079244bb69bc7379c8f76622f3fc28ae20ef68064eb7594c26b755",
            "8a634d325fd4ecd247344c596c31422c3a9b981d29549940eab31a15046b4961",
        ),
        Source(
            "electronic-phone/map_item.json.gz",
            "3517062f4b4f1db67a5424de99add802b3e848b019149410352271fb39af2a85",
            "f6a914143fabf16411ef98612bcabe930992f2da5eeecb7077941ee3b20a638c",
        ),
    ),
    "electronic-phone-ts": Published(
        ("electronic", "phone"),
        Source(
            "electronic-phone/electronic_phone_ts_preprocessed.txt.gz",
            "3e7093eb02d52cf20c082209ed3b90a9657ca8cccee1d99e524b2cb0005d0d81",
            "19af3dd0940221b9f5aa95531f1aa0452685225ade2861b1a8d992ecc1fd194b",
        ),
        Source(
            "electronic-phone/ts_map_item.json.gz",
            "716c34fb568afa0ceec884c13f8d2641da5994986dfa079f65ebb2ca68d22c61",
            "48a1207f10957bb5a3b4c8999c03e5a009945f8348bcb290e45a7367f12bbb02",
        ),
    ),
    "sport-phone": Published(
        ("sport", "phone"),
        Source(
            "sport-phone/sport_phone_preprocessed.txt.gz",
            "16cebba11c9431ab3acce2397dbbe4702090f21c97c32afda52bf6a05d682a4b",
            "6d604333d8e0a58d88ee30db38753be21e1474cb5bc34f33fc1e5234e65d2ff7",
        ),
        Source(
            "sport-phone/map_item.json.gz",
            "fbc1a2c4f0a05424e04020c8a88ea0ee29e9a714562026bef9fc26cd9f6d2fc7",
            "06df1e1a60190cb619666c1fa0bfc4b6d7793821b03a3f608d0593500730c9e2",
        ),
    ),
    "sport-phone-open": Open(
        ("sport", "phone"),
        (
            Source(
                "single-domain/sports_5core.txt.gz",
                "f1d9a63a30a175607edd53af95ec90a7537a9d134386ad8d7602cda7fa6f12a1",
                "4ca2d88d5f689b3fdfbd665419c565f25d13de618641a0660d9558362ffbe514",
            ),
            Source(
                "single-domain/cell_phones_5core.txt.gz",
                "299f8047f7cae2b394f54a303b15d43eff7712ac8a9b76bd250433a1666e7206",
                "3294a93fbae49edaf7e8e92166da8559668719515b719d93d026320b71fa2195",
            ),
        ),
        one_domain_users=10_000,
    ),
}

_FOOD_KITCHEN_TITLES = TextSource(
    "titles",
    Source(
        "food-kitchen/titles.json.gz",
        "ded7f1fc2c43f8ddca6f48b534b18b1ab2a7cee39c6dbd5d80eb515524c69f77",
        "2537c114ca28e61e80e0fef7720f319ee91abbea8bb370807a4878f21390c64e",
    ),
)
_BEAUTY_TITLES = TextSource(
    "titles",
    Source(
        "titles/beauty.json.gz",
        "c38b2e5121a7f8c9fe93a095f3e50a08fbae13d1c719f2314e1cf9e307a296b9",
        "f2f790d4e9ac15e828378935e478336368a06d8c4cb30b36dbbff8642fedadad",
    ),
)
_SPORT_KEYWORDS = TextSource(
    "keywords generated by a language model",
    Source(
        "item-keywords/sports_keywords.json.gz",
        "a85f747edf77176ed4ccac2868ae3b6532d83df63bd22cb89e648c57d52b9f2b",
        "d193179ae22ac71df6921ded86c5fd5f6b443268ad3ee87027acbeb981744610",
    ),
)
_PHONE_CATEGORIES = TextSource(
    "category strings",
    Source(
        "item-keywords/phones_categories.json.gz",
        "b30e723e7d9b21b2016ad4667e375c227c923660cf54d788420fb098d96c0018",
        "9b5ff9a29ade017923580b8a16de3980d5ecfcf8bc2b13e02617591877986dcc",
    ),
)
# What the items of domain A and of domain B say, as far as it was found. None for Electronics and Clothing.
TEXTS: dict[str, tuple[TextSource | None, TextSource | None]] = {
    "food-kitchen": (_FOOD_KITCHEN_TITLES, _FOOD_KITCHEN_TITLES),
    "beauty-electronics": (_BEAUTY_TITLES, None),
    "cloth-sport": (None, _SPORT_KEYWORDS),
    "electronic-phone": (None, _PHONE_CATEGORIES),
    "electronic-phone-ts": (None, _PHONE_CATEGORIES),
    "sport-phone": (_SPORT_KEYWORDS, _PHONE_CATEGORIES),
    "sport-phone-open": (_SPORT_KEYWORDS, _PHONE_CATEGORIES),
}
