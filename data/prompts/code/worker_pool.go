// A pool of workers that resizes a queue of pictures, stops early on request and reports what became of each.
package main

import (
	"context"
	"errors"
	"fmt"
	"sort"
	"sync"
	"time"
)

type Picture struct {
	Name          string
	Width, Height int
}

type Outcome struct {
	Picture Picture
	Took    time.Duration
	Err     error
}

var ErrTooSmall = errors.New("picture is already smaller than the target")

func shrink(ctx context.Context, p Picture, width int) (Picture, error) {
	if p.Width <= width {
		return p, fmt.Errorf("%s: %w", p.Name, ErrTooSmall)
	}
	work := time.Duration(p.Width*p.Height/100_000) * time.Microsecond
	select {
	case <-time.After(work):
	case <-ctx.Done():
		return p, ctx.Err()
	}
	return Picture{p.Name, width, p.Height * width / p.Width}, nil
}

func process(ctx context.Context, pictures []Picture, workers, width int) []Outcome {
	jobs := make(chan Picture)
	results := make(chan Outcome)
	var group sync.WaitGroup
	for i := 0; i < workers; i++ {
		group.Add(1)
		go func() {
			defer group.Done()
			for p := range jobs {
				begin := time.Now()
				small, err := shrink(ctx, p, width)
				results <- Outcome{small, time.Since(begin), err}
			}
		}()
	}
	go func() {
		defer close(jobs)
		for _, p := range pictures {
			select {
			case jobs <- p:
			case <-ctx.Done():
				return
			}
		}
	}()
	go func() {
		group.Wait()
		close(results)
	}()
	var outcomes []Outcome
	for outcome := range results {
		outcomes = append(outcomes, outcome)
	}
	sort.Slice(outcomes, func(i, j int) bool { return outcomes[i].Picture.Name < outcomes[j].Picture.Name })
	return outcomes
}

func main() {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	pictures := []Picture{{"harbour", 4000, 3000}, {"icon", 64, 64}, {"panorama", 9000, 1500}}
	for _, o := range process(ctx, pictures, 2, 800) {
		if errors.Is(o.Err, ErrTooSmall) {
			fmt.Printf("%-10s kept as it is\n", o.Picture.Name)
			continue
		}
		fmt.Printf("%-10s %dx%d (error: %v)\n", o.Picture.Name, o.Picture.Width, o.Picture.Height, o.Err)
	}
}
