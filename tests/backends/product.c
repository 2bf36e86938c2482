/* Runs a compiled product on one matrix: product FILE OUT. FILE: eleven int64 (N, K, tokens, rows of a piece, strides of
   codes and scales, bytes of codes, scales, biases, x and sums), then these five arrays. OUT: y, float32 [tokens, N].
   test_cpu_kernels.py compiles it for processors that are emulated. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

void product(int64_t table, int64_t scratch);

int main(int argc, char **argv) {
    int64_t head[11], counter = 0, at[5];
    FILE *file = fopen(argv[1], "rb");
    if (argc != 3 || !file || fread(head, 8, 11, file) != 11) return 1;
    for (int i = 0; i < 5; i++) {
        void *array = malloc(head[6 + i] + 1);
        if (fread(array, 1, head[6 + i], file) != (size_t)head[6 + i]) return 2;
        at[i] = (int64_t)array;
    }
    int64_t n = head[0], k = head[1], tokens = head[2], rows = head[3];
    float *y = malloc(4 * n * tokens), *scratch = malloc(4 * 64 * 768);
    int64_t table[] = {(int64_t)&counter, 1, (n + rows - 1) / rows, rows, n, k, head[4], head[5], 4 * k, 4 * n,
                       at[0], at[1], at[2], at[3], at[4], (int64_t)y, tokens};
    product((int64_t)table, (int64_t)scratch);
    file = fopen(argv[2], "wb");
    return !file || fwrite(y, 4, n * tokens, file) != (size_t)(n * tokens) || fclose(file);
}
