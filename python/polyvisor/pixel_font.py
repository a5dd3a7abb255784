"""Letters for pictures that are made of pixels and nothing else: 5 wide, 7 high, and 2 below the
line."""

from __future__ import annotations

from functools import cache

#: From one character to the next.
ADVANCE = 6
#: Above the line that they stand on.
HEIGHT = 7

#: Each character, then its rows from the top: a digit of base 32 has a bit for every pixel, the
#: leftmost the highest.
_ROWS = r"""
0ehjlphe 14c4444e 2eh168gv 3eh161he 426aiv22 5vgu11he 668guhhe
7v124444 8ehhehhe 9ehhf12c a00e1fhf bgguhhhu c00ehghe d11fhhhf
e00ehvge f698s888 g00fhhhf1e hgguhhhh i40c444e j2062222ic kggikoki
lc44444e m00qllll n00uhhhh o00ehhhe p00uhhhugg q00fhhhf11 r00mpggg
s00fge1u t88s8896 u00hhhhf v00hhha4 w00hllla x00ha4ah y00hhhhf1e
z00v248v A4ahhvhh Buhhuhhu Cehggghe Duhhhhhu Evgguggv Fvgguggg
Gehgnhhe Hhhhvhhh Ie44444e J72222ic Khikokih Lggggggv Mhrllhhh
Nhppljjh Oehhhhhe Puhhuggg Qehhhlid Ruhhukih Sfgge11u Tv444444
Uhhhhhhe Vhhhhha4 Whhhllrh Xhha4ahh Yhha4444 Zv1248gv .00000cc
,00000c48 :0cc0cc0 ;0cc0c48 -000v000 +044v440 =00v0v00 _0000000v
/11248gg (2488842 )8422248 <248g842 >8421248 [e88888e ]e22222e
'4400000 "aa00000
"""
_GLYPHS = {word[0]: [int(digit, 32) for digit in word[1:]] for word in _ROWS.split()}
_UNKNOWN = [31, 17, 17, 17, 17, 17, 31]


@cache
def glyph(character: str) -> tuple[tuple[int, int], ...]:
    """The (x, y) of its pixels, from the top left. A box for what has no glyph."""
    rows = [] if character == " " else _GLYPHS.get(character, _UNKNOWN)
    return tuple((x, y) for y, row in enumerate(rows) for x in range(5) if row >> (4 - x) & 1)
