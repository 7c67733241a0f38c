import java.time.LocalTime;
import java.util.ArrayList;
import java.util.Comparator;
import java.util.List;
import java.util.Optional;
import java.util.TreeMap;

/** Bookings of one meeting room on one day: no two overlap, and gaps can be found. */
public final class RoomBookings {

    public record Slot(LocalTime from, LocalTime to) {
        public Slot {
            if (!from.isBefore(to)) {
                throw new IllegalArgumentException("a slot must end after it begins: " + from + " to " + to);
            }
        }

        boolean overlaps(Slot other) {
            return from.isBefore(other.to) && other.from.isBefore(to);
        }

        long minutes() {
            return java.time.Duration.between(from, to).toMinutes();
        }
    }

    private final Slot opening;
    private final TreeMap<LocalTime, Slot> booked = new TreeMap<>();

    public RoomBookings(Slot opening) {
        this.opening = opening;
    }

    public boolean book(Slot wanted) {
        if (wanted.from().isBefore(opening.from()) || wanted.to().isAfter(opening.to())) {
            return false;
        }
        var before = booked.floorEntry(wanted.from());
        var after = booked.ceilingEntry(wanted.from());
        boolean taken = before != null && before.getValue().overlaps(wanted)
                || after != null && after.getValue().overlaps(wanted);
        if (!taken) {
            booked.put(wanted.from(), wanted);
        }
        return !taken;
    }

    public List<Slot> gaps() {
        List<Slot> free = new ArrayList<>();
        LocalTime cursor = opening.from();
        for (Slot slot : booked.values()) {
            if (cursor.isBefore(slot.from())) {
                free.add(new Slot(cursor, slot.from()));
            }
            cursor = slot.to();
        }
        if (cursor.isBefore(opening.to())) {
            free.add(new Slot(cursor, opening.to()));
        }
        return free;
    }

    /** The tightest gap in which a meeting of this length fits. */
    public Optional<Slot> suggest(int minutes) {
        return gaps().stream()
                .filter(gap -> gap.minutes() >= minutes)
                .min(Comparator.comparingLong(Slot::minutes))
                .map(gap -> new Slot(gap.from(), gap.from().plusMinutes(minutes)));
    }

    private static Slot slot(String from, String to) {
        return new Slot(LocalTime.parse(from), LocalTime.parse(to));
    }

    public static void main(String[] args) {
        var room = new RoomBookings(slot("08:00", "18:00"));
        System.out.println(room.book(slot("09:00", "10:30")));
        System.out.println(room.book(slot("10:00", "11:00")));
        System.out.println(room.book(slot("11:15", "12:00")));
        System.out.println(room.suggest(45).map(Slot::toString).orElse("no room today"));
    }
}
