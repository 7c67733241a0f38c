//! A queue of fixed capacity that overwrites its oldest element when it is full.

use std::fmt;

pub struct RingBuffer<T> {
    slots: Vec<Option<T>>,
    start: usize,
    len: usize,
}

impl<T> RingBuffer<T> {
    pub fn new(capacity: usize) -> Self {
        assert!(capacity > 0, "a ring buffer needs at least one slot");
        let mut slots = Vec::with_capacity(capacity);
        slots.resize_with(capacity, || None);
        RingBuffer { slots, start: 0, len: 0 }
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_full(&self) -> bool {
        self.len == self.slots.len()
    }

    /// Appends `value`; returns the element that had to make room for it, if any.
    pub fn push(&mut self, value: T) -> Option<T> {
        let capacity = self.slots.len();
        let end = (self.start + self.len) % capacity;
        let evicted = self.slots[end].replace(value);
        if evicted.is_some() {
            self.start = (self.start + 1) % capacity;
        } else {
            self.len += 1;
        }
        evicted
    }

    pub fn pop(&mut self) -> Option<T> {
        let value = self.slots[self.start].take()?;
        self.start = (self.start + 1) % self.slots.len();
        self.len -= 1;
        Some(value)
    }

    pub fn iter(&self) -> impl Iterator<Item = &T> + '_ {
        let capacity = self.slots.len();
        (0..self.len).filter_map(move |i| self.slots[(self.start + i) % capacity].as_ref())
    }
}

impl<T: fmt::Display> fmt::Display for RingBuffer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let items: Vec<String> = self.iter().map(|item| item.to_string()).collect();
        write!(f, "[{}]", items.join(", "))
    }
}

fn main() {
    let mut readings = RingBuffer::new(4);
    for celsius in [18.5, 18.9, 19.4, 19.1, 18.2, 17.6] {
        if let Some(old) = readings.push(celsius) {
            println!("{celsius} pushed out {old}");
        }
    }
    let mean = readings.iter().sum::<f64>() / readings.len() as f64;
    println!("{readings} mean {mean:.2}, full: {}", readings.is_full());
    while let Some(value) = readings.pop() {
        print!("{value} ");
    }
    println!();
}
