-- A lending library: who has which book, what is overdue, and what people read.

CREATE TABLE member (
    id      INTEGER PRIMARY KEY,
    name    TEXT NOT NULL,
    joined  DATE NOT NULL
);

CREATE TABLE book (
    id      INTEGER PRIMARY KEY,
    title   TEXT NOT NULL,
    author  TEXT NOT NULL,
    copies  INTEGER NOT NULL DEFAULT 1 CHECK (copies > 0)
);

CREATE TABLE loan (
    book_id    INTEGER NOT NULL REFERENCES book (id),
    member_id  INTEGER NOT NULL REFERENCES member (id),
    lent_on    DATE NOT NULL,
    due_on     DATE NOT NULL,
    returned   DATE,
    PRIMARY KEY (book_id, member_id, lent_on),
    CHECK (due_on > lent_on)
);

CREATE INDEX loan_open ON loan (book_id) WHERE returned IS NULL;

INSERT INTO member VALUES (1, 'Agnes Holm', '2019-03-02'), (2, 'Tomas Reyes', '2021-11-15'),
                          (3, 'Wanda Okafor', '2023-06-30');
INSERT INTO book VALUES (1, 'The Glass Orchard', 'P. Lindgren', 2), (2, 'Tides and Tables', 'R. Amis', 1),
                        (3, 'A Manual of Knots', 'J. Farrow', 1);
INSERT INTO loan VALUES (1, 1, '2024-01-03', '2024-01-24', '2024-01-20'),
                        (1, 2, '2024-02-01', '2024-02-22', NULL),
                        (2, 3, '2024-02-05', '2024-02-26', NULL),
                        (3, 1, '2024-02-10', '2024-03-02', '2024-02-12');

-- What is on the shelf today?
SELECT b.title, b.copies - COUNT(l.book_id) AS available
FROM book AS b
LEFT JOIN loan AS l ON l.book_id = b.id AND l.returned IS NULL
GROUP BY b.id, b.title, b.copies
ORDER BY b.title;

-- Overdue on the first of March, the longest first.
SELECT m.name, b.title, julianday('2024-03-01') - julianday(l.due_on) AS days_late
FROM loan AS l
JOIN member AS m ON m.id = l.member_id
JOIN book AS b ON b.id = l.book_id
WHERE l.returned IS NULL AND l.due_on < '2024-03-01'
ORDER BY days_late DESC;

-- Each member's most recent loan, and how many there were before it.
WITH numbered AS (
    SELECT member_id, book_id, lent_on,
           ROW_NUMBER() OVER (PARTITION BY member_id ORDER BY lent_on DESC) AS recency,
           COUNT(*) OVER (PARTITION BY member_id) AS loans
    FROM loan
)
SELECT m.name, b.title, n.lent_on, n.loans - 1 AS earlier_loans
FROM numbered AS n
JOIN member AS m ON m.id = n.member_id
JOIN book AS b ON b.id = n.book_id
WHERE n.recency = 1;
