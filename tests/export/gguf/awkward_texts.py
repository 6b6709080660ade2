"""About 600 awkward texts for tokenizers: groups of a few seeds under all manners of spacing, repetition or case.

qlora/export/gguf/probe_texts.json, which is tried at every export, has some of every group.
"""

from __future__ import annotations

from collections.abc import Iterator

_WORDS = ("Hello", "world", "fox", "Straße", "naïve", "привет", "γειά", "日本語", "한국어", "ไทย", "ok")
_SPACES = (
    " ",
    "  ",
    "   ",
    "        ",
    "\t",
    "\t\t",
    "\n",
    "\n\n",
    "\n\n\n",
    "\r\n",
    "\r\n\r\n",
    "\r",
    " \n",
    "\n ",
    " \t ",
    "\n\t\n",
)
_RARE_SPACES = ("\u00a0", "\u2003", "\u3000", "\u2028", "\u0085", "\u000b", "\u000c", "\u200b", "\ufeff", "\u00ad")
_EMOJI = ("🚀", "😶‍🌫️", "👩‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇩🇪", "❤️", "☎︎", "1️⃣", "🦙🦙", "✅", "\U0001fae0", "🫶🏿")
_COMBINING = (
    "e\u0301",
    "é",
    "a\u0308\u0304",
    "n\u0303",
    "ﬁ",
    "Å",
    "A\u030a",
    "s\u0323\u0307",
    "ż\u0323",
    "각",
    "\u1100\u1161\u11a8",
    "क्षि",
    "กำ",
    "ḍ̇",
)
_SCRIPTS = (
    "Это обычное предложение, написанное по-русски.",
    "Η γρήγορη καφέ αλεπού πηδάει.",
    "我想在apple工作1314151天～",
    "吾輩は猫である。名前はまだ無い。",
    "カタカナとﾊﾝｶｸ",
    "안녕하세요, 세계!",
    "שלום עולם, מה שלומך?",
    "السَّلامُ عَلَيْكُم ١٢٣",
    "नमस्ते दुनिया १२३",
    "កាន់តែពិសេសអាច",
    "สวัสดีชาวโลก",
    "Xin chào thế giới, đường phố Việt Nam",
    "ქართული ენა ᲥᲐᲠᲗᲣᲚᲘ",
    "Հայերեն լեզու",
    "አማርኛ ቋንቋ",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟙𝟚𝟛 𐐷𐐲",
    "\u202eright to left\u202c and back",
    "ΑΒΓ абв ABC İıſK",
)
_NUMBERS = (
    "0",
    "7",
    "42",
    "123",
    "1234",
    "12345",
    "123456",
    "1234567890",
    "3.14159",
    "1,234,567.89",
    "-5",
    "1e-10",
    "0xDEADBEEF",
    "007",
    "²³¼",
    "ⅫⅣ",
    "١٢٣٤",
    "１２３４",
    "1st 2nd",
    "10:30",
    "2024-05-17",
    "50%",
    "$99.99",
    "1 2 3",
    "3 33 333 3333 33333",
)
_CONTRACTIONS = (
    "I'm",
    "you're",
    "he's",
    "we've",
    "they'll",
    "I'd",
    "don't",
    "'RE you",
    "'M not",
    "'LL do",
    "WE'VE",
    "IT'S",
    "can'T",
    "'Tis",
    "o'clock",
    "'s",
    "''s",
    "’s it’s",
    "'ſ",
    "rock'n'roll",
    "a'lL",
    "'D you",
)
_CODE = (
    "def f(x):\n    return x ** 2  # square\n",
    "if (a != b && c <= d) { x += 1; }",
    'for(int i=0;i<10;++i){\n\tprintf("%d\\n", i);\n}',
    "SELECT * FROM t WHERE a = 'b' -- comment",
    '<div class="x">&nbsp;</div><!-- y -->',
    '{"a": [1, 2.5, null], "b": {"c": true}}',
    "https://example.org/path/to?query=1&x=%20#frag",
    "user.name+tag@sub.example.co.uk",
    "C:\\Users\\name\\file.txt",
    "/usr/local/bin/../lib",
    "a_b_c snake_case camelCase PascalCase SCREAMING_CASE kebab-case",
    "$x^2 + \\frac{1}{2}$ \\alpha",
    "`code` **bold** _italic_ ~~gone~~ > quote",
    "| a | b |\n|---|---|\n| 1 | 2 |",
    "------======______******",
    "''''''```````\"\"\"\"......!!!!!!??????",
    "#!/bin/sh\nset -e\n",
    "x=1;y=2;;z",
    "@@ -1,3 +1,4 @@",
    "3..3 3...3 a..b",
)
_SPECIALS = (
    "<s>",
    "</s>",
    "<unk>",
    "<pad>",
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|end|>",
    "<bos>",
    "<eos>",
    "<end_of_turn>",
    "[INST]",
    "<0x0A>",
    "<|im_start",
    "|im_end|>",
    "▁",
    "▁▁",
    "Ġ",
    "[PAD5]",
)
_CONTROLS = (
    "\x00",
    "\x01",
    "\x07",
    "\x08",
    "\x1b[0m",
    "\x7f",
    "\x80",
    "\x9f",
    "\ufffd",
    "\ue0a1",
    "\U000f0000",
    "\u0378",
    "\U0010ffff",
    "\ufdd0",
)


def _groups() -> Iterator[list[str]]:
    """Each kind of text, mild cases first."""
    yield ["", *_WORDS, "a", "I", ".", "The quick brown fox jumps over the lazy dog."]
    yield [text for space in _SPACES for text in (space, f"a{space}b", f"{space}a", f"a{space}", f"a.{space}B")]
    yield [
        " " * count + tail
        for count in (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64)
        for tail in ("", "x", "\n", "1")
    ]
    yield [text for space in _RARE_SPACES for text in (space, f"a{space}b", f"{space}{space}1", f" {space} ")]
    yield [text for emoji in _EMOJI for text in (emoji, f"go {emoji}{emoji} now")]
    yield [text for mark in _COMBINING for text in (mark, f"ca{mark} {mark}s", mark.upper())]
    yield [text for line in _SCRIPTS for text in (line, f" {line}\n", line.upper())]
    yield [text for number in _NUMBERS for text in (number, f"costs {number} now", f"x{number}y")]
    yield [text for word in _CONTRACTIONS for text in (word, f"  {word} sure?", word.swapcase())]
    yield [text for code in _CODE for text in (code, f"\n\n{code}")]
    yield [text for token in _SPECIALS for text in (token, f"a {token} b", f"{token}\n{token} c", token[:-1])]
    yield [text for control in _CONTROLS for text in (control, f"a{control}b {control} 1")]
    yield [
        "x" * 300,
        "ab" * 200,
        "pneumonoultramicroscopicsilicovolcanoconiosis" * 4,
        "9" * 100,
        "!?" * 80,
        "日本" * 60,
        "é" * 90,
    ]
    yield ["Abc DEF gHi JKl", "ÄÖÜ äöü ÉcoLe", "McDonald's iPhone", "ЁЖик В ТУМАНЕ", "ǅ ǆ Ǆ", "ﬀ ß ẞ", "ªº ʰ"]


PROBES = tuple(dict.fromkeys(text for group in _groups() for text in group))
