//! What a memory and a scope may hold.

use aeterna_types::Layer;

use super::{add, addition, body, scope};
use crate::domain::{Body, MAX_TAGS, Outcome};
use crate::error::MemoryError;
use crate::store::{Addition, Relational};

pub async fn tags_that_are_united_have_an_end(store: &dyn Relational) {
    let tagged = |letter: char, count: usize| Body {
        tags: (0..count).map(|number| format!("{letter}{number:02}")).collect(),
        ..body("many tags")
    };
    let ann = scope(Layer::User, "tags");
    let items = [tagged('b', 40), tagged('a', 40)];
    let items = items.map(|body| addition(ann.clone(), body, None)).into();
    let last = add(store, "tags", items).await.remove(1).unwrap();
    assert_eq!(last.outcome, Outcome::Merged);
    let tags = last.memory.body.tags;
    assert!(tags.len() == MAX_TAGS && tags.is_sorted(), "{tags:?}");
    assert_eq!(
        tags.iter().filter(|tag| tag.starts_with('b')).count(),
        40,
        "what it had stays"
    );
}

pub async fn a_scope_takes_what_it_has_room_for(store: &dyn Relational) {
    let ann = scope(Layer::User, "room");
    let item = |number: usize| Addition {
        most: Some((3, "small".into())),
        ..addition(ann.clone(), body(&format!("room {number}")), None)
    };
    let mut taken = Vec::new();
    // What says the same again needs no room.
    for batch in [vec![0, 1, 0], vec![1, 2, 3], vec![2, 4]] {
        let results = add(store, "room", batch.into_iter().map(item).collect()).await;
        taken.extend(results.into_iter().map(|result| match result {
            Ok(written) => Some(written.outcome),
            Err(MemoryError::Forbidden { policy, .. }) if policy == "small" => None,
            Err(error) => panic!("{error:?}"),
        }));
    }
    let (new, old) = (Some(Outcome::Created), Some(Outcome::Merged));
    assert_eq!(taken, [new, new, old, old, new, None, old, None]);
}
