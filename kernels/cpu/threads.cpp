// How many threads the calling thread's calls may use; torch.set_num_threads sets the same number.

#include "common.h"

#include <omp.h>

EXPORT int mr_num_threads() { return omp_get_max_threads(); }
EXPORT void mr_set_num_threads(int threads) { omp_set_num_threads(threads); }
