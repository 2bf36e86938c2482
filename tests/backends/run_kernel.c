/* Runs a compiled kernel once: run_kernel FILE OUT. FILE: int64 numbers of fields and of arrays; for each field of the
   kernel's table an array's number and an offset into it, or -1 and a value; the arrays' sizes in bytes, and the arrays.
   OUT: the last array. cpu_targets.py compiles it for processors that are emulated. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

void kernel(int64_t table, int64_t scratch);

int main(int argc, char **argv) {
    int64_t counts[2], fields[256][2], table[256], sizes[16];
    char *arrays[16], *scratch = malloc(4 * 64 * 768);
    FILE *file = argc == 3 ? fopen(argv[1], "rb") : NULL;
    if (!file || fread(counts, 8, 2, file) != 2 || counts[0] > 256 || counts[1] > 16) return 1;
    if (fread(fields, 16, counts[0], file) != (size_t)counts[0]) return 2;
    if (fread(sizes, 8, counts[1], file) != (size_t)counts[1]) return 3;
    for (int i = 0; i < counts[1]; i++) {
        arrays[i] = malloc(sizes[i] + 1);
        if (fread(arrays[i], 1, sizes[i], file) != (size_t)sizes[i]) return 4;
    }
    for (int i = 0; i < counts[0]; i++)
        table[i] = fields[i][1] + (fields[i][0] < 0 ? 0 : (int64_t)arrays[fields[i][0]]);
    kernel((int64_t)table, (int64_t)scratch);
    int last = counts[1] - 1;
    file = fopen(argv[2], "wb");
    return !file || fwrite(arrays[last], 1, sizes[last], file) != (size_t)sizes[last] || fclose(file);
}
