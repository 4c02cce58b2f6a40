"""The columns of the UCI tables, which most of their files do not name. Private."""

from __future__ import annotations

from lossbook.data._parse import Kind, RowReader, TableFormat, table_rows, xlsx_rows

Columns = tuple[tuple[str, Kind], ...]


def _numbers(*names: str) -> Columns:
    return tuple((name, "number") for name in names)


def _categories(*names: str) -> Columns:
    return tuple((name, "category") for name in names)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _named(*names: str) -> dict[str, str]:
    """Classes that are called what the file says."""
    return {name: name for name in names}


_CLASS: Columns = (("class", "class"),)
_ID: Columns = (("id", "ignored"),)

_MAIL_WORDS = _words(
    "make address all 3d our over remove internet order mail receive will people report addresses free business email "
    "you credit your font 000 money hp hpl george 650 lab labs telnet 857 data 415 85 technology 1999 parts pm direct "
    "cs meeting original project re edu table conference"
)
_CELL = _words(
    "radius texture perimeter area smoothness compactness concavity concave_points symmetry fractal_dimension"
)
_BEAN = _words(
    "Area Perimeter MajorAxisLength MinorAxisLength AspectRation Eccentricity ConvexArea EquivDiameter Extent Solidity "
    "roundness Compactness ShapeFactor1 ShapeFactor2 ShapeFactor3 ShapeFactor4"
)
# The file calls two columns Score_B; ours are numbered.
_AUDIT = _words(
    "Sector_score LOCATION_ID PARA_A Score_A Risk_A PARA_B Score_B Risk_B TOTAL numbers Score_B Risk_C Money_Value "
    "Score_MV Risk_D District_Loss PROB Risk_E History Prob Risk_F Score Inherent_Risk CONTROL_RISK Detection_Risk "
    "Audit_Risk Risk"
)

TABLES: dict[str, tuple[tuple[str, ...], TableFormat, RowReader]] = {
    "abalone": (
        ("abalone.data",),
        TableFormat(
            _categories("sex")
            + _numbers("length", "diameter", "height", "whole", "shucked", "viscera", "shell")
            + _CLASS,
            _named(*(str(rings) for rings in (*range(1, 28), 29))),  # no shell has 28
        ),
        table_rows,
    ),
    "adult": (
        ("adult.data", "adult.test"),
        TableFormat(
            _numbers("age")
            + _categories("workclass")
            + _numbers("fnlwgt")
            + _categories("education")
            + _numbers("education-num")
            + _categories("marital-status", "occupation", "relationship", "race", "sex")
            + _numbers("capital-gain", "capital-loss", "hours-per-week")
            + _categories("native-country")
            + _CLASS,
            {"<=50K": "<=50K", ">50K": ">50K", "<=50K.": "<=50K", ">50K.": ">50K"},  # with a full stop in adult.test
            unknown="0",  # this copy has 0 where the archive's has ?
        ),
        table_rows,
    ),
    "audit-risk": (
        ("audit_risk.csv",),
        TableFormat(
            _numbers("Sector_score")
            + _categories("LOCATION_ID")  # numbers and three names of places
            + _numbers(*_AUDIT[2:6], "Score_B.1", *_AUDIT[7:10], "Score_B.2", "Risk_C")
            + (("Money_Value", "number or empty"),)
            + _numbers(*_AUDIT[13:-1])
            + _CLASS,
            {"0": "not fraudulent", "1": "fraudulent"},
            header=_AUDIT,
        ),
        table_rows,
    ),
    "balance-scale": (
        ("balance-scale.data",),
        TableFormat(
            _CLASS + _numbers("left-weight", "left-distance", "right-weight", "right-distance"),
            {"0": "left", "1": "right", "2": "balanced"},  # this copy has numbers where the archive's has L, R, B
        ),
        table_rows,
    ),
    "car": (
        ("car.data",),
        TableFormat(
            _categories("buying", "maint", "doors", "persons", "lug_boot", "safety") + _CLASS,
            _named("unacc", "acc", "good", "vgood"),
        ),
        table_rows,
    ),
    "dry-bean": (
        ("Dry_Bean_Dataset.xlsx",),
        TableFormat(
            _numbers(*_BEAN) + _CLASS,
            _named("SEKER", "BARBUNYA", "BOMBAY", "CALI", "HOROZ", "SIRA", "DERMASON"),
            header=(*_BEAN, "Class"),
        ),
        xlsx_rows,
    ),
    "german": (
        ("german.data",),
        TableFormat(
            _categories("status")
            + _numbers("duration")
            + _categories("history", "purpose")
            + _numbers("amount")
            + _categories("savings", "employment")
            + _numbers("rate")
            + _categories("personal", "debtors")
            + _numbers("residence")
            + _categories("property")
            + _numbers("age")
            + _categories("plans", "housing")
            + _numbers("credits")
            + _categories("job")
            + _numbers("dependents")
            + _categories("telephone", "foreign")
            + _CLASS,
            {"1": "good", "2": "bad"},
            separator="\t",
        ),
        table_rows,
    ),
    "iris": (
        ("iris.data",),
        TableFormat(
            _numbers("sepal-length", "sepal-width", "petal-length", "petal-width") + _CLASS,
            {"Iris-setosa": "setosa", "Iris-versicolor": "versicolor", "Iris-virginica": "virginica"},
        ),
        table_rows,
    ),
    "spambase": (
        ("spambase.data",),
        TableFormat(
            _numbers(
                *(f"word:{word}" for word in _MAIL_WORDS),
                *(f"character:{character}" for character in ";([!$#"),
                "capitals:average",
                "capitals:longest",
                "capitals:total",
            )
            + _CLASS,
            {"0": "mail", "1": "spam"},
        ),
        table_rows,
    ),
    "wdbc": (
        ("wdbc.data",),
        TableFormat(
            _ID + _CLASS + _numbers(*(f"{cell}:{form}" for form in ("mean", "error", "worst") for cell in _CELL)),
            {"B": "benign", "M": "malignant"},
        ),
        table_rows,
    ),
    "wine": (
        ("wine.data",),
        TableFormat(
            _CLASS
            + _numbers(
                "alcohol",
                "malic-acid",
                "ash",
                "alcalinity",
                "magnesium",
                "phenols",
                "flavanoids",
                "nonflavanoid-phenols",
                "proanthocyanins",
                "colour",
                "hue",
                "OD280/OD315",
                "proline",
            ),
            _named("1", "2", "3"),
        ),
        table_rows,
    ),
}
