"""Block masks: which blocks of keys each block of queries sees."""

from fastattn.blockmask.lists import Lists as Lists
from fastattn.blockmask.mask import BlockMask as BlockMask
from fastattn.blockmask.mask import of_flex as of_flex
