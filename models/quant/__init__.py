"""Weight formats by name. To add one: a file beside this, and a line here."""

from tilewright.models.quant.base import WeightFormat
from tilewright.models.quant.dense import Dense
from tilewright.models.quant.q4_0 import Q4_0
from tilewright.models.quant.q4_1 import Q4_1
from tilewright.models.quant.q8_0 import Q8_0
from tilewright.models.quant.rows import Rows

FORMATS: dict[str, WeightFormat] = {
    f.name: f
    for f in (Rows("bf16_rows"), Rows("f16_rows"), Dense("f32"), Dense("f16"), Dense("bf16"), Q4_0(), Q4_1(), Q8_0())
}
