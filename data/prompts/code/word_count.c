/* Count the words of standard input and print the twenty most frequent ones. */
#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define BUCKETS 4096
#define LONGEST 64

struct entry {
    struct entry *next;
    unsigned long count;
    char word[];
};

static struct entry *table[BUCKETS];
static size_t distinct;

static unsigned hash(const char *word)
{
    unsigned h = 2166136261u;
    for (; *word; word++)
        h = (h ^ (unsigned char)*word) * 16777619u;
    return h % BUCKETS;
}

static void count_word(const char *word)
{
    struct entry **slot = &table[hash(word)];
    for (struct entry *e = *slot; e; e = e->next) {
        if (strcmp(e->word, word) == 0) {
            e->count++;
            return;
        }
    }
    struct entry *fresh = malloc(sizeof *fresh + strlen(word) + 1);
    if (!fresh) {
        perror("word_count");
        exit(EXIT_FAILURE);
    }
    strcpy(fresh->word, word);
    fresh->count = 1;
    fresh->next = *slot;
    *slot = fresh;
    distinct++;
}

static int by_count(const void *left, const void *right)
{
    const struct entry *a = *(struct entry *const *)left;
    const struct entry *b = *(struct entry *const *)right;
    if (a->count != b->count)
        return a->count < b->count ? 1 : -1;
    return strcmp(a->word, b->word);
}

int main(void)
{
    char word[LONGEST + 1];
    size_t length = 0;
    for (int c; (c = getchar()) != EOF || length; ) {
        if (c != EOF && (isalpha(c) || c == '\'')) {
            if (length < LONGEST)
                word[length++] = (char)tolower(c);
        } else if (length) {
            word[length] = '\0';
            count_word(word);
            length = 0;
        }
    }
    struct entry **sorted = malloc((distinct + 1) * sizeof *sorted);
    size_t n = 0;
    for (size_t i = 0; sorted && i < BUCKETS; i++)
        for (struct entry *e = table[i]; e; e = e->next)
            sorted[n++] = e;
    if (n)
        qsort(sorted, n, sizeof *sorted, by_count);
    for (size_t i = 0; i < n && i < 20; i++)
        printf("%8lu  %s\n", sorted[i]->count, sorted[i]->word);
    free(sorted);
    return 0;
}
