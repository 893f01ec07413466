"""Fails if a value typed on the command line is misread, or a malformed one is accepted."""

import pytest

from fastattn.bench import options


def test_lengths():
    assert options.parse_lengths("512,1k,2K") == [512, 1024, 2048]
    assert options.parse_lengths("512..4k, 384") == [384, 512, 1024, 2048, 4096]
    assert options.parse_lengths("1m") == [1 << 20]
    assert options.parse_lengths("700..1k") == [700]


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5k", "2k..1k", "512,", "k"])
def test_bad_lengths(text):
    with pytest.raises(ValueError, match="length"):
        options.parse_lengths(text)


def test_dtypes_and_names():
    assert options.parse_dtypes("fp32, bfloat16") == ["float32", "bfloat16"]
    with pytest.raises(ValueError, match="int8"):
        options.parse_dtypes("fp32,int8")
    with pytest.raises(ValueError, match="names given"):
        options.parse_names(" ", "impl", ("a",))


def test_fractions():
    assert options.parse_fraction("5%") == pytest.approx(0.05)
    assert options.parse_fraction("0.2") == 0.2
    for text in ("five", "-1%", "inf", "nan", ""):
        with pytest.raises(ValueError, match="share"):
            options.parse_fraction(text)


def test_windows_and_integers():
    assert options.parse_window("255,0") == (255, 0)
    assert options.parse_window("none,0") == (None, 0)
    assert options.parse_integers("64,128", "head-dim") == [64, 128]
    for text in ("255", "a,b", "-1,0"):
        with pytest.raises(ValueError, match="window"):
            options.parse_window(text)
    for text in ("64,x", "0", ""):
        with pytest.raises(ValueError, match="head-dim"):
            options.parse_integers(text, "head-dim")
