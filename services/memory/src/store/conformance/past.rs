//! What was, and what stands beside memories.

use aeterna_types::{Layer, Scope};

use super::{add, addition, at, body, change, listing, scope, writer};
use crate::domain::{Body, DocumentChange, Edit, Kind, Outcome, Policy, Rules, ScopeKey, Subject, Text, View};
use crate::error::MemoryError;
use crate::store::{Change, ExportPage, Imported, Progress, Relational};

pub async fn visible(store: &dyn Relational, tenant: &str, scope: &Scope) -> Vec<ScopeKey> {
    let view = View {
        scope: scope.clone(),
        exact: true,
    };
    store.visible(&tenant.parse().unwrap(), &view, &[]).await.unwrap()
}

/// A change to another text.
pub fn replaced(content: &str) -> Change {
    Change::Replace {
        body: Box::new(body(content)),
        vector: None,
        reindex: true,
    }
}

/// A clock that goes back makes times that go back, and nothing else: versions, order and what is there do not depend on it.
pub async fn the_past_is_there_and_the_clock_may_go_back(store: &dyn Relational) {
    let (tenant, ann) = ("past", scope(Layer::User, "ann"));
    let first = add(store, tenant, vec![addition(ann.clone(), body("old words"), None)])
        .await
        .remove(0)
        .unwrap();
    let id = first.memory.id;
    let second = change(store, &writer(tenant, 50), id, None, replaced("new words"), None)
        .await
        .unwrap();
    let third = change(store, &writer(tenant, 20), id, None, replaced("newest words"), None)
        .await
        .unwrap();
    assert!(third.memory.version == 3 && third.sequence > second.sequence);
    let name = tenant.parse().unwrap();
    let then = |seconds| store.past(&name, id, at(seconds));
    assert_eq!(then(10).await.unwrap().unwrap().body.content, "old words");
    // Said later, although the clock said earlier.
    assert_eq!(then(60).await.unwrap().unwrap().body.content, "newest words");
    assert!(then(-1).await.unwrap().is_none());

    let scopes = visible(store, tenant, &ann).await;
    let mut past = listing(tenant, scopes.clone());
    past.as_of = Some(at(10));
    let listed = store.list(&past).await.unwrap();
    assert_eq!((listed.len(), listed[0].memory.body.content.as_str()), (1, "old words"));
    let found = store.as_of(&name, &scopes, None, at(10), 10).await.unwrap();
    assert_eq!((found.unchanged.len(), found.changed.len()), (0, 1));
    assert!(found.changed[0].reworded && found.changed[0].memory.body.content == "old words");
    let found = store.as_of(&name, &scopes, None, at(60), 10).await.unwrap();
    assert_eq!((found.unchanged.len(), found.changed.len()), (1, 0));
    // Written before the epoch of the others, it is still found after them, and is the last change.
    let late = store
        .add(&writer(tenant, -500), vec![addition(ann, body("from the past"), None)])
        .await
        .unwrap();
    let late = late.into_iter().next().unwrap().unwrap();
    assert!(late.sequence > third.sequence);
    assert_eq!(store.list(&listing(tenant, scopes)).await.unwrap().len(), 2);
    let (documents, with) = {
        let found = store
            .frequencies(&name, &["word".into(), "absent".into()])
            .await
            .unwrap();
        (found.documents, found.with)
    };
    assert_eq!((documents, with), (2, vec![1, 0]));
}

/// Documents and policies have versions, and their changes are told.
pub async fn documents_and_policies_are_kept(store: &dyn Relational) {
    let (tenant, ann) = ("docs", scope(Layer::User, "ann"));
    let name = tenant.parse().unwrap();
    let text = |content: &str| Text {
        title: String::new(),
        content: content.into(),
        media_type: "text/plain".into(),
        metadata: serde_json::Map::new(),
        tags: Vec::new(),
        comment: String::new(),
    };
    let edit = |edit: Edit| DocumentChange {
        scope: ann.clone(),
        path: "a/b.txt".into(),
        etag: None,
        edit,
        idempotency: None,
    };
    let put = |content: &str| edit(Edit::Put(Box::new(text(content))));
    let missing = store.change_document(&writer(tenant, 1), edit(Edit::Delete)).await;
    assert!(matches!(missing, Err(MemoryError::NoDocument(_))));
    for (content, version) in [("one", 1), ("two", 2)] {
        let (document, _) = store
            .change_document(&writer(tenant, version), put(content))
            .await
            .unwrap();
        assert_eq!(document.version, version);
    }
    let gone = store.change_document(&writer(tenant, 3), edit(Edit::Restore(9))).await;
    assert!(matches!(gone, Err(MemoryError::NoVersion(9))));
    let (restored, _) = store
        .change_document(&writer(tenant, 3), edit(Edit::Restore(1)))
        .await
        .unwrap();
    assert_eq!((restored.version, restored.text.content.as_str()), (3, "one"));
    let found = store.document(&name, &ann, "a/b.txt", Some(2)).await.unwrap().unwrap();
    assert_eq!(found.text.content, "two");
    assert!(
        store
            .document(&"docs2".parse().unwrap(), &ann, "a/b.txt", None)
            .await
            .unwrap()
            .is_none()
    );
    let versions = store
        .document_versions(&name, &ann, "a/b.txt", Some(3), 10)
        .await
        .unwrap();
    assert_eq!(versions.iter().map(|one| one.version).collect::<Vec<_>>(), [2, 1]);

    let policy = Policy {
        name: "p".into(),
        scope: Scope::default(),
        layers: Vec::new(),
        rules: Rules {
            max_memories: Some(1),
            ..Rules::default()
        },
        description: String::new(),
        version: 0,
        updated_at: at(0),
        updated_by: String::new(),
    };
    let stored = store
        .put_policy(&writer(tenant, 4), policy.clone(), None, None, None)
        .await
        .unwrap();
    let stale = store
        .put_policy(&writer(tenant, 5), policy.clone(), None, Some("old".into()), None)
        .await;
    assert!(matches!(stale, Err(MemoryError::EtagMismatch)));
    assert_eq!(store.policies(&name).await.unwrap(), std::slice::from_ref(&stored));
    assert!(store.policies(&"docs2".parse().unwrap()).await.unwrap().is_empty());
    store
        .delete_policy(&writer(tenant, 6), "p", Some(stored.etag()))
        .await
        .unwrap();
    let told = store
        .changes(Some(&name), crate::domain::Sequence::default(), 100)
        .await
        .unwrap();
    let told: Vec<_> = told
        .into_iter()
        .map(|change| match change.subject {
            Subject::Document(document) => (change.kind, document.version),
            Subject::Policy(_, policy) => (change.kind, i64::from(policy.is_some())),
            Subject::Memory(..) => panic!("there is no memory"),
        })
        .collect();
    let wanted = [
        (Kind::Added, 1),
        (Kind::Updated, 2),
        (Kind::Updated, 3),
        (Kind::Added, 0),
        (Kind::Deleted, 0),
    ];
    assert_eq!(told, wanted);
}

/// What is exported is imported once, as it was, and only where there is room.
pub async fn exports_are_imported_as_they_were(store: &dyn Relational) {
    let (from, to, ann) = ("out", "in", scope(Layer::User, "ann"));
    let bodies: Vec<Body> = (0..5).map(|number| body(&format!("export {number}"))).collect();
    let items = bodies
        .into_iter()
        .map(|body| addition(ann.clone(), body, Some(3)))
        .collect();
    let added = add(store, from, items).await;
    let deleted = added[4].as_ref().unwrap().memory.id;
    change(store, &writer(from, 9), deleted, None, Change::Delete, None)
        .await
        .unwrap();
    let page = |tenant: &'static str, history: bool| {
        let ann = ann.clone();
        async move {
            ExportPage {
                tenant: tenant.parse().unwrap(),
                scopes: visible(store, tenant, &ann).await,
                filter: None,
                after: crate::domain::Key(0),
                limit: 100,
                history,
                vectors: true,
                most: 4096,
                now: at(100),
            }
        }
    };
    assert_eq!(store.export(&page(from, false).await).await.unwrap().len(), 4);
    let exported = store.export(&page(from, true).await).await.unwrap();
    assert_eq!(
        (exported.len(), exported[4].versions.len(), exported[0].vectors.len()),
        (5, 2, 1)
    );
    let imported = |most: Option<i64>| -> Vec<(i64, Imported)> {
        let one = |one: &crate::store::Exported| Imported {
            memory: one.memory.clone(),
            named: true,
            versions: one.versions.clone(),
            vectors: one.vectors.clone(),
            most: most.map(|most| (most, "p".to_owned())),
        };
        (0..).zip(exported.iter().map(one)).collect()
    };
    let narrow = ExportPage {
        most: 100,
        ..page(from, true).await
    };
    let refused = store.export(&narrow).await;
    assert!(
        matches!(refused, Err(MemoryError::TooManyVersions { limit: 100, .. })),
        "{refused:?}"
    );
    let (writer, id) = (writer(to, 200), "i".parse().unwrap());
    let mut progress = Progress {
        items: 5,
        digest: [7; 32],
        refused: [0].into(),
    };
    // Other ids: those are of another tenant here.
    let results = store
        .import(&writer, &id, imported(Some(2)), &mut progress)
        .await
        .unwrap();
    let verdicts: Vec<_> = results
        .iter()
        .map(|result| match result {
            Ok((outcome, _)) => Some(*outcome),
            Err(MemoryError::Forbidden { .. }) => None,
            Err(error) => panic!("{error:?}"),
        })
        .collect();
    let created = Some(Outcome::Created);
    // Two live ones have room, and the deleted one needs none.
    assert_eq!(verdicts, [created, created, None, None, created]);
    assert_eq!(progress.refused, [2, 3].into());
    assert_eq!(
        store.import_progress(&writer, &id).await.unwrap(),
        Some(progress.clone())
    );
    let arrived = store.export(&page(to, true).await).await.unwrap();
    assert_eq!(
        (arrived.len(), arrived[2].versions.len(), arrived[0].vectors.len()),
        (3, 2, 1)
    );
    assert_ne!(arrived[0].memory.id, exported[0].memory.id);
    assert_eq!(arrived[0].memory.created_at, exported[0].memory.created_at);
    let again = store
        .import(&writer, &"j".parse().unwrap(), imported(None), &mut progress)
        .await
        .unwrap();
    let merged = again
        .iter()
        .filter(|result| matches!(result, Ok((Outcome::Merged, _))))
        .count();
    assert_eq!(
        (again.len(), merged),
        (5, 2),
        "the same words are there already; what is deleted is not"
    );
}
