// What this machine can do at most with the chosen number of threads, measured when first asked.
#pragma once

namespace camelid::benchmarks {

double read_peak_gb_s();
double int8_peak_gop_s();   // the best of the integer loops; 0 where there is none
double float_peak_gop_s();  // the best of float32; bf16 products are not float32's peak
double bf16_peak_gop_s();   // 0 where there is none

}  // namespace camelid::benchmarks
