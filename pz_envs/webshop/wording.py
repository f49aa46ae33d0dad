"""The words of the built-in catalogue: kinds, attributes, options, and other ways to say them.

Pure data. A kind belongs to a category; attributes and option values come with paraphrases that
share no word with them, so that matching words alone does not solve an instruction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of product: its name, another name, its shelf, option axes and price range ($)."""

    name: str
    other_name: str
    category: str
    shelf: str
    axes: tuple[str, ...]
    low: float
    high: float


KINDS: tuple[Kind, ...] = (
    Kind("table lamp", "bedside light", "garden", "Lighting › Lamps", ("color", "style"), 14, 120),
    Kind(
        "storage bench", "seat with a chest", "garden", "Furniture › Benches", ("color",), 45, 400
    ),
    Kind("area rug", "floor carpet", "garden", "Decor › Rugs", ("color", "extent"), 25, 450),
    Kind("window curtains", "drapes", "garden", "Decor › Drapery", ("color", "extent"), 15, 140),
    Kind(
        "bath towels",
        "cotton cloths for drying",
        "garden",
        "Bath › Linen",
        ("color", "count"),
        9,
        70,
    ),
    Kind("shampoo", "hair wash", "beauty", "Hair Care › Cleansing", ("scent", "volume"), 6, 45),
    Kind(
        "hand cream",
        "lotion for dry palms",
        "beauty",
        "Skin Care › Hands",
        ("scent", "volume"),
        5,
        35,
    ),
    Kind(
        "lip balm", "chapped-mouth stick", "beauty", "Skin Care › Lips", ("scent", "count"), 3, 20
    ),
    Kind("face serum", "facial drops", "beauty", "Skin Care › Face", ("volume",), 8, 90),
    Kind(
        "bath salts", "crystals for the tub", "beauty", "Bath › Soaks", ("scent", "volume"), 7, 40
    ),
    Kind(
        "rain jacket",
        "wet-weather coat",
        "fashion",
        "Outerwear › Coats",
        ("color", "size", "fit"),
        30,
        200,
    ),
    Kind(
        "running shoes",
        "jogging trainers",
        "fashion",
        "Footwear › Sport",
        ("color", "shoe"),
        35,
        180,
    ),
    Kind(
        "wool socks",
        "warm footwear liners",
        "fashion",
        "Hosiery › Winter",
        ("color", "count"),
        8,
        40,
    ),
    Kind(
        "cargo pants",
        "many-pocket trousers",
        "fashion",
        "Bottoms › Casual",
        ("color", "size", "fit"),
        20,
        95,
    ),
    Kind("summer dress", "light frock", "fashion", "Dresses › Casual", ("color", "size"), 18, 120),
    Kind(
        "headphones",
        "over-the-ears audio set",
        "electronics",
        "Audio › Personal",
        ("color", "style"),
        20,
        380,
    ),
    Kind("phone case", "mobile cover", "electronics", "Mobile › Covers", ("color",), 6, 45),
    Kind(
        "charging cable",
        "cord for power",
        "electronics",
        "Mobile › Cords",
        ("length", "count"),
        5,
        30,
    ),
    Kind(
        "desk speaker",
        "small loud box for music",
        "electronics",
        "Audio › Home",
        ("color",),
        18,
        240,
    ),
    Kind(
        "power bank",
        "pocket battery",
        "electronics",
        "Mobile › Batteries",
        ("color", "count"),
        14,
        90,
    ),
    Kind(
        "green tea", "unfermented leaf brew", "grocery", "Drinks › Leaf", ("flavor", "count"), 4, 35
    ),
    Kind("granola bars", "oat snacks", "grocery", "Snacks › Cereal", ("flavor", "count"), 4, 38),
    Kind(
        "ground coffee",
        "milled espresso beans",
        "grocery",
        "Drinks › Roast",
        ("flavor", "weight"),
        6,
        50,
    ),
    Kind(
        "trail mix",
        "hiking nuts and fruit",
        "grocery",
        "Snacks › Nuts",
        ("flavor", "weight"),
        5,
        42,
    ),
    Kind(
        "hot sauce", "spicy condiment", "grocery", "Pantry › Condiments", ("flavor", "count"), 4, 28
    ),
)

DEPARTMENTS: Mapping[str, str] = {
    "garden": "Home & Kitchen",
    "beauty": "Beauty & Personal Care",
    "fashion": "Clothing, Shoes & Jewelry",
    "electronics": "Electronics",
    "grocery": "Grocery & Gourmet Food",
}

ATTRIBUTES: Mapping[str, Mapping[str, str]] = {
    "garden": {
        "machine washable": "can go into the laundry drum",
        "easy assembly": "goes together without a struggle",
        "solid wood": "is made of massive timber",
        "fade resistant": "keeps its tint for years",
        "space saving": "fits a tiny flat",
        "water proof": "shrugs off spills",
        "non slip": "stays put underfoot",
        "heavy duty": "takes rough handling",
        "hand woven": "was made on a loom by a person",
    },
    "beauty": {
        "cruelty free": "was never tried on animals",
        "paraben free": "leaves out those doubtful preservatives",
        "sulfate free": "has no harsh foaming agents",
        "tea tree": "holds oil of melaleuca",
        "long lasting": "still works at the end of the day",
        "sensitive skin": "does not irritate delicate faces",
        "hyaluronic acid": "binds moisture like a sponge",
        "travel size": "passes airport control",
        "vitamin e": "contains tocopherol",
    },
    "fashion": {
        "quick drying": "loses moisture in no time",
        "elastic waist": "stretches around the middle",
        "rubber sole": "has a grippy bottom",
        "arch support": "holds up the instep",
        "moisture wicking": "moves sweat away",
        "wide width": "suits broad feet and hips",
        "hand wash": "wants a basin, never a drum",
        "polyester lining": "is synthetic on the inside",
        "button closure": "is fastened without a zip",
    },
    "electronics": {
        "fast charging": "is full again within the hour",
        "noise cancelling": "shuts out the outside world",
        "water resistant": "survives a shower",
        "wireless bluetooth": "needs no wires",
        "shock absorbent": "forgives a fall",
        "aluminum alloy": "has a light metal body",
        "usb port": "takes the usual flat plug",
        "high definition": "is crisp to the last detail",
        "plug play": "works at once without drivers",
    },
    "grocery": {
        "gluten free": "is fine for coeliacs",
        "non gmo": "comes from unmodified crops",
        "usda organic": "was grown without pesticides and certified",
        "low sugar": "is barely sweet",
        "dairy free": "holds nothing from cows",
        "kosher certified": "has a rabbi's approval",
        "resealable bag": "can be closed again",
        "caffeine free": "lets me sleep at night",
        "artificial colors": "may be brightly dyed",
    },
}
"""Category to attribute to a paraphrase that follows ``that``."""

OPTIONS: Mapping[str, Mapping[str, str]] = {
    "color": {
        "navy": "the deepest sea blue",
        "ivory": "off-white like old piano keys",
        "charcoal": "almost black, a bit lighter",
        "burgundy": "the shade of a French wine",
        "teal": "between blue and green",
        "mustard": "a warm yellow like a condiment",
        "lavender": "pale purple",
        "olive": "a muted army green",
        "coral": "pinkish orange as a reef",
    },
    "style": {
        "modern": "contemporary looks",
        "farmhouse": "countryside looks",
        "vintage": "a grandparents' era look",
        "minimal": "nothing superfluous",
    },
    "extent": {
        "4 ft x 6 ft": "four feet on the short side",
        "5 ft x 8 ft": "five feet on the short side",
        "8 ft x 10 ft": "eight feet on the short side",
        "3 ft x 5 ft": "three feet on the short side",
    },
    "count": {
        "pack of 1": "a single one",
        "pack of 2": "a pair",
        "pack of 4": "four at once",
        "pack of 6": "half a dozen",
        "pack of 12": "a dozen",
    },
    "scent": {
        "eucalyptus": "smelling of koala leaves",
        "vanilla": "smelling of the orchid pod bakers use",
        "unscented": "without any smell",
        "citrus": "smelling of oranges and their kin",
        "cedar": "smelling of pencil timber",
    },
    "volume": {
        "2 fl oz": "about 60 ml",
        "4 fl oz": "about 120 ml",
        "8 fl oz": "about a quarter of a litre",
        "16 fl oz": "about half a litre",
    },
    "size": {
        "x-small": "the tiniest cut",
        "small": "one step under medium",
        "medium": "the middle cut",
        "large": "one step over medium",
        "x-large": "two steps over medium",
    },
    "fit": {
        "slim": "close to the body",
        "regular": "the usual cut",
        "relaxed": "loose and comfortable",
    },
    "shoe": {
        "8": "one under nine",
        "9": "one over eight",
        "10": "two over eight",
        "11": "three over eight",
    },
    "length": {
        "3 feet": "roughly one metre",
        "6 feet": "roughly two metres",
        "10 feet": "roughly three metres",
    },
    "flavor": {
        "honey": "the taste that bees make",
        "dark chocolate": "the taste of bitter cacao",
        "jasmine": "the taste of a white night flower",
        "sea salt": "the taste of the ocean",
        "maple": "the taste of Canadian syrup",
        "smoked": "the taste of a campfire",
    },
    "weight": {
        "8 ounce": "half a pound",
        "12 ounce": "three quarters of a pound",
        "16 ounce": "one pound",
        "32 ounce": "two pounds",
    },
}
"""Option name to value to a paraphrase."""

OPENINGS: tuple[str, ...] = (
    "i am looking for {thing}",
    "i need {thing}",
    "please find me {thing}",
    "can you get {thing}",
    "i would like to buy {thing}",
    "my friend wants {thing}",
)

USES: tuple[str, ...] = (
    *("every day", "a gift", "the guest room", "the office", "a weekend away", "small households"),
    *("busy mornings", "the whole family", "cold evenings", "long journeys"),
)
